"""What the Gluon kernels share.

Rule: a barrier is allocated only where the program goes on to wait for it, up to its end. Triton gives the memory of
one that nobody uses any more to other buffers, and without `mbarrier.invalidate` (PTX: required before other use) the
processor may write the barrier's state into it late. `tests/kernels/gpu/test_aot.py` looks for that.
"""

from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = gl.constexpr(1.4426950408889634)
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


class _Address:
    """Stands in for a tensor in a descriptor that must not keep the tensor alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=8192)
def matrix_descriptor(
    address: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int, dtype: torch.dtype
) -> TensorDescriptor:
    """Of a matrix of 16-bit numbers, rows `stride` apart, that is copied in boxes; zeros stand beyond its edges."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(
        _Address(address, dtype), [rows, columns], [stride, 1], [box_rows, box_columns], layout
    )


def cache_descriptor(
    address: int, rows: int, head_dim: int, box: int, dtype: torch.dtype
) -> TensorDescriptor:
    """Of a cache as a matrix of `rows` rows, copied in boxes of `box` rows, padded with zeros to a power of two."""
    return matrix_descriptor(address, rows, head_dim, head_dim, box, triton.next_power_of_2(head_dim), dtype)
