"""What the Gluon kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of a program's threads, or of those of a partition. Triton 3.7 renamed it."""


@gluon.jit
def gdc_wait(USE_PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    """As `_launch.gdc_wait`."""
    if USE_PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def gdc_launch_dependents(USE_PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    """As `_launch.gdc_launch_dependents`."""
    if USE_PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1
        )
