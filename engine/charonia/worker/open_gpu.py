"""Opens the GPU while PyTorch is being imported. Each takes a second or more."""

import ctypes
import sys
import threading


def open_gpu_early() -> None:
    """Let the driver open the first visible GPU in a thread of its own, if there is a driver.

    PyTorch finds the device's primary context open, and tells what is wrong with the device if it is not. A process
    that has PyTorch already may have chosen another device: there, nothing is done.
    """
    if "torch" not in sys.modules:
        threading.Thread(target=_retain_primary_context, name="charonia-open-gpu", daemon=True).start()


def _retain_primary_context() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
