"""Dense projection on the CPU: weights stream once from memory in their stored dtype, products accumulate in fp32.

Rows are taken four at a time against two weight rows, all accumulators in registers. Memory-bound at few rows, it
also keeps pace with a packed sgemm at many, without unpacking bf16 weights to memory.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import torch
import torch.nn.functional as F
from numba import carray

from charonia_kernels.cpu._jit import INT, SOURCE_DIGEST, WORK, Kernel, jit
from charonia_kernels.cpu._simd import claim_item, offset, pointer
from charonia_kernels.cpu._threads import num_threads
from charonia_kernels.cpu._tiles import dot_tile

_F32 = numba.float32


class _Args(ctypes.Structure):
    _fields_ = [
        *WORK,
        *((name, INT) for name in ("x", "weight", "bias", "out")),
        *((name, INT) for name in ("rows", "columns", "depth", "columns_per_item")),
    ]


# Prefetch so many bytes ahead of a tile's weights: 1.4 times the bandwidth at up to 8 rows, measured on rows of 1 KB.
_AHEAD = 4608


def _strip(rows: int, width: int) -> Callable[..., None]:
    """``out[rows, columns] = x @ weight.T + bias`` for a fixed number of rows, ``width`` columns at a time."""
    tile, edge = dot_tile(rows, width, _AHEAD), dot_tile(rows, 1)

    @jit
    def strip(x, weight, columns, depth, bias, bias_step, out, out_stride):  # type: ignore[no-untyped-def]
        column = 0
        while column + width <= columns:
            w, b = offset(weight, column * depth), offset(bias, column * bias_step)
            tile(x, depth, w, depth, depth, b, offset(out, column), out_stride)
            column += width
        while column < columns:
            w, b = offset(weight, column * depth), offset(bias, column * bias_step)
            edge(x, depth, w, depth, depth, b, offset(out, column), out_stride)
            column += 1

    return strip


# Measured on AVX2 (16 registers): wider tiles spill, and narrower ones wait for the multiply-adds; a single row is
# bound by memory and prefers few streams.
_STRIP_1, _STRIP_2, _STRIP_3, _STRIP_4 = _strip(1, 2), _strip(2, 4), _strip(3, 3), _strip(4, 2)


@jit
def _panel(x, rows, weight, columns, depth, bias, bias_step, out, out_stride):  # type: ignore[no-untyped-def]
    row = 0
    while row + 4 <= rows:
        x_row, out_row = offset(x, row * depth), offset(out, row * out_stride)
        _STRIP_4(x_row, weight, columns, depth, bias, bias_step, out_row, out_stride)
        row += 4
    x_rest, out_rest = offset(x, row * depth), offset(out, row * out_stride)
    if rows - row == 3:
        _STRIP_3(x_rest, weight, columns, depth, bias, bias_step, out_rest, out_stride)
    elif rows - row == 2:
        _STRIP_2(x_rest, weight, columns, depth, bias, bias_step, out_rest, out_stride)
    elif rows - row == 1:
        _STRIP_1(x_rest, weight, columns, depth, bias, bias_step, out_rest, out_stride)


def _build(weight_type: Any, out_type: Any) -> Callable[[Any], None]:
    digest = SOURCE_DIGEST

    def entry(args):  # type: ignore[no-untyped-def]
        if digest == "":
            return
        a = carray(args, 1)[0]
        x, bias = pointer(a.x, _F32), pointer(a.bias, _F32)
        bias_step = 1 if a.bias else 0
        weight, out = pointer(a.weight, weight_type), pointer(a.out, out_type)
        while True:
            item = claim_item(args)
            if item >= a.num_items:
                break
            first = item * a.columns_per_item
            columns = min(a.columns_per_item, a.columns - first)
            w, b = offset(weight, first * a.depth), offset(bias, first * bias_step)
            _panel(x, a.rows, w, columns, a.depth, b, bias_step, offset(out, first), a.columns)

    return entry


KERNEL = Kernel(_Args, _build)

# A core's share of the L2 cache that one item's weights may take; they are read once per four rows.
_ITEM_BYTES = 128 * 1024
# Below this many weight bytes, waking the pool costs more than it saves.
_INLINE_BYTES = 96 * 1024
# F.linear repacks the weights in each call, about three times their memory traffic: a native bf16 matmul repays that
# once this kernel is bound by arithmetic, some four times over the rows at which it stops being bound by memory.
_NATIVE_MIN_ROWS = 32


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How one projection is computed.

    Attributes:
        use_torch: leave it to ``F.linear``; the other fields are then unused.
        columns_per_item: weight rows in a work item.
        threads: workers.
    """

    use_torch: bool
    columns_per_item: int
    threads: int


@lru_cache(maxsize=4096)
def plan_linear(
    rows: int, columns: int, depth: int, dtype: torch.dtype, threads: int, native_bf16: bool
) -> LinearPlan:
    """Choose the path and the partition for ``x[rows, depth] @ weight[columns, depth].T``; pure.

    Args:
        rows: of x.
        columns: rows of the weight.
        depth: shared dimension.
        dtype: of the weight.
        threads: most workers to use.
        native_bf16: whether the CPU multiplies bf16 in hardware.
    """
    use_torch = native_bf16 and dtype == torch.bfloat16 and rows >= _NATIVE_MIN_ROWS
    row_bytes = max(1, depth * dtype.itemsize)
    workers = 1 if columns * row_bytes * max(1, rows // 4) < _INLINE_BYTES else threads
    even = -(-columns // (4 * workers))
    width = max(1, min(even, _ITEM_BYTES // row_bytes))
    # Multiples of 12 suit every tile width (2, 3 and 4).
    return LinearPlan(use_torch, -(-width // 12) * 12, workers)


@lru_cache(maxsize=1)
def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX), as torch sees it."""
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(probe is not None and probe() for probe in probes)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; see :func:`charonia_kernels.reference.linear`.

    Args:
        x: ``[T, K]``, fp32 or bf16.
        weight: ``[N, K]``, fp32 or bf16; contiguous, or it is copied.
        bias: ``[N]`` or None.

    Returns:
        ``[T, N]`` in x's dtype.

    Raises:
        ValueError: x and weight do not share K.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    if weight.shape[1] != depth:
        raise ValueError(f"linear: x is [{rows}, {depth}], weight [{columns}, {weight.shape[1]}]")
    plan = plan_linear(rows, columns, depth, weight.dtype, num_threads(), has_native_bf16())
    if plan.use_torch and x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    out = torch.empty((rows, columns), dtype=x.dtype)
    wide, weight = x.to(torch.float32).contiguous(), weight.contiguous()
    wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
    args = _Args(
        0,
        0,
        -(-columns // plan.columns_per_item) if rows else 0,
        wide.data_ptr(),
        weight.data_ptr(),
        0 if wide_bias is None else wide_bias.data_ptr(),
        out.data_ptr(),
        rows,
        columns,
        depth,
        plan.columns_per_item,
    )
    KERNEL.launch((weight.dtype, x.dtype), args, plan.threads)
    return out
