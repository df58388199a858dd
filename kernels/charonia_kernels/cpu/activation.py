"""Gated activations on the CPU: ``act(gate) * up`` over the halves of one fused projection.

Both activations are ``gate * sigmoid(z)``: z is the gate itself for SiLU, and ``2 * sqrt(2 / pi) * (gate + 0.044715 *
gate**3)`` for GELU's tanh form, because ``(1 + tanh(u)) / 2 = sigmoid(2 * u)``.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray

from charonia_kernels.cpu._jit import INT, SOURCE_DIGEST, WORK, Kernel, jit, workers_for
from charonia_kernels.cpu._math import exp_f32
from charonia_kernels.cpu._simd import claim_item, load, pointer, store

_ROWS_PER_ITEM = 4
_GELU_LINEAR = np.float32(2.0 * 0.7978845608028654)
_GELU_CUBIC = np.float32(0.044715)


class _Args(ctypes.Structure):
    _fields_ = [*WORK, *((name, INT) for name in ("x", "out", "rows", "width", "x_stride"))]


@jit
def _gated(gate, up, out, width, gelu):  # type: ignore[no-untyped-def]
    for i in range(width):
        g = load(gate, i)
        z = _GELU_LINEAR * (g + _GELU_CUBIC * g * g * g) if gelu else g
        store(out, i, g / (np.float32(1.0) + exp_f32(-z)) * load(up, i))


def _build(x_type: Any, gelu: bool) -> Callable[[Any], None]:
    digest = SOURCE_DIGEST
    size = x_type.bitwidth // 8

    def entry(args):  # type: ignore[no-untyped-def]
        if digest == "":
            return
        a = carray(args, 1)[0]
        while True:
            item = claim_item(args)
            if item >= a.num_items:
                break
            for row in range(item * _ROWS_PER_ITEM, min(a.rows, (item + 1) * _ROWS_PER_ITEM)):
                start = a.x + row * a.x_stride * size
                gate = pointer(start, x_type)
                up = pointer(start + a.width * size, x_type)
                out = pointer(a.out + row * a.width * size, x_type)
                _gated(gate, up, out, a.width, gelu)

    return entry


KERNEL = Kernel(_Args, _build)


def _launch(x: torch.Tensor, gelu: bool) -> torch.Tensor:
    rows, double = x.shape
    if double % 2 != 0 or x.stride(1) != 1:
        raise ValueError(
            f"gated activation: x {list(x.shape)}, strides {x.stride()}, is not [T, 2 * I], contiguous"
        )
    width = double // 2
    out = torch.empty((rows, width), dtype=x.dtype)
    items = -(-rows // _ROWS_PER_ITEM)
    args = _Args(0, 0, items, x.data_ptr(), out.data_ptr(), rows, width, x.stride(0))
    KERNEL.launch((x.dtype, gelu), args, workers_for(4 * rows * width, items))
    return out


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; see :func:`charonia_kernels.reference.silu_mul`.

    Args:
        x: ``[T, 2 * I]``, fp32 or bf16, last dimension contiguous.

    Returns:
        ``[T, I]`` in x's dtype.
    """
    return _launch(x, False)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up``, tanh form; see :func:`charonia_kernels.reference.gelu_tanh_mul`.

    Args:
        x: ``[T, 2 * I]``, fp32 or bf16, last dimension contiguous.

    Returns:
        ``[T, I]`` in x's dtype.
    """
    return _launch(x, True)
