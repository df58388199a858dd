"""RMSNorm on the CPU, alone and behind a residual add; one pass over each row while it is in the L1 cache."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray

from charonia_kernels.cpu._jit import FLOAT, INT, SOURCE_DIGEST, WORK, Kernel, jit, workers_for
from charonia_kernels.cpu._simd import claim_item, load, pointer, store

_ROWS_PER_ITEM = 8


class _Args(ctypes.Structure):
    _fields_ = [
        *WORK,
        *((name, INT) for name in ("x", "residual", "weight", "out")),
        *((name, INT) for name in ("rows", "width", "x_stride", "residual_stride")),
        ("eps", FLOAT),
    ]


@jit
def _normalise(x, weight, out, width, eps):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(width):
        value = load(x, i)
        total += value * value
    inverse = np.float32(1.0 / np.sqrt(np.float64(total) / width + eps))
    for i in range(width):
        store(out, i, load(x, i) * inverse * load(weight, i))


@jit
def _accumulate(x, residual, width):  # type: ignore[no-untyped-def]
    for i in range(width):
        store(residual, i, load(residual, i) + load(x, i))


def _build(x_type: Any, residual_type: Any, weight_type: Any, add: bool) -> Callable[[Any], None]:
    digest = SOURCE_DIGEST
    x_bytes, residual_bytes = x_type.bitwidth // 8, residual_type.bitwidth // 8

    def entry(args):  # type: ignore[no-untyped-def]
        if digest == "":
            return
        a = carray(args, 1)[0]
        weight = pointer(a.weight, weight_type)
        while True:
            item = claim_item(args)
            if item >= a.num_items:
                break
            for row in range(item * _ROWS_PER_ITEM, min(a.rows, (item + 1) * _ROWS_PER_ITEM)):
                x = pointer(a.x + row * a.x_stride * x_bytes, x_type)
                out = pointer(a.out + row * a.width * x_bytes, x_type)
                if add:
                    residual_address = a.residual + row * a.residual_stride * residual_bytes
                    residual = pointer(residual_address, residual_type)
                    _accumulate(x, residual, a.width)
                    _normalise(residual, weight, out, a.width, a.eps)
                else:
                    _normalise(x, weight, out, a.width, a.eps)

    return entry


KERNEL = Kernel(_Args, _build)


def _check(op: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse what the kernel would misread: it sees addresses only."""
    fits = x.shape == residual.shape and weight.shape == x.shape[1:]
    if not fits or x.stride(1) != 1 or residual.stride(1) != 1 or weight.stride(0) != 1:
        shapes = ", ".join(f"{list(t.shape)} with strides {t.stride()}" for t in (x, residual, weight))
        raise ValueError(
            f"{op}: x, residual and weight do not fit or have gaps in the last dimension: {shapes}"
        )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight``; see :func:`charonia_kernels.reference.rms_norm`.

    Args:
        x: ``[T, H]``, fp32 or bf16, last dimension contiguous.
        weight: ``[H]``, fp32 or bf16, contiguous.
        eps: added to the mean square.

    Returns:
        ``[T, H]`` in x's dtype, contiguous.

    Raises:
        ValueError: shapes differ, or the last dimension has gaps.
    """
    rows, width = x.shape
    _check("rms_norm", x, x, weight)
    out = torch.empty((rows, width), dtype=x.dtype)
    items = -(-rows // _ROWS_PER_ITEM)
    args = _Args(
        0, 0, items, x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), rows, width, x.stride(0), 0, eps
    )
    KERNEL.launch((x.dtype, x.dtype, weight.dtype, False), args, workers_for(rows * width, items))
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x`` in place, then its norm; see :func:`charonia_kernels.reference.add_rms_norm`.

    Args:
        x: ``[T, H]``, fp32 or bf16, last dimension contiguous.
        residual: ``[T, H]``, fp32 or bf16, last dimension contiguous; updated in place.
        weight: ``[H]``, fp32 or bf16, contiguous.
        eps: added to the mean square.

    Returns:
        ``[T, H]`` in x's dtype, contiguous.

    Raises:
        ValueError: shapes differ, or the last dimension has gaps.
    """
    rows, width = x.shape
    _check("add_rms_norm", x, residual, weight)
    out = torch.empty((rows, width), dtype=x.dtype)
    items = -(-rows // _ROWS_PER_ITEM)
    args = _Args(
        0,
        0,
        items,
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        residual.stride(0),
        eps,
    )
    KERNEL.launch((x.dtype, residual.dtype, weight.dtype, True), args, workers_for(2 * rows * width, items))
    return out
