"""The packages with the kernels of one kind of device. Each is loaded when it is first used, as compilers load slowly:
who has no GPU never waits for Triton, and who has one never waits for numba.
"""

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charonia_kernels import cpu, gpu
else:

    def _lazy(name: str) -> ModuleType:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        loader = importlib.util.LazyLoader(spec.loader)
        spec.loader = loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loader.exec_module(module)
        return module

    cpu = _lazy("charonia_kernels.cpu")
    gpu = _lazy("charonia_kernels.gpu")

__all__ = ["cpu", "gpu"]
