"""Linear layers of a few rows: fused multiply-adds on weights that pass through registers."""

import triton
import triton.language as tl

from charonia_kernels.gpu._launch import gdc_launch_dependents, gdc_wait
from charonia_kernels.gpu.linear_tile import load_columns, prefetch, silu_mul_pairs, weight_rows


@triton.jit(do_not_specialize=["M"])
def vector_kernel(  # type: ignore[no-untyped-def]
    # Tensors: x [M, K], norm_weight [K], weight [N, K], bias [N], residual and out [M, N] (GATED: [M, N // 2]).
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    # Scalars.
    M,
    N,
    x_stride,
    out_stride,
    eps,
    # Tile.
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    # What is fused.
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program: all rows of x against BLOCK_N rows of the weight, BLOCK_K columns at a time.

    Sums stay in the thread that loaded the weight, eight columns folded into one, until the end. The first tile of the
    weight is on its way before the wait, PREFETCH bytes of each row behind it are on their way to the L2 cache.
    """
    gdc_launch_dependents(USE_PDL)
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    first = tl.program_id(0) * OUT_N
    rows = weight_rows(first, N, BLOCK_N, GATED)
    # What streams is [BLOCK_K / 8, BLOCK_M, BLOCK_N, 8]: Triton then lays the threads out along the first dimension,
    # and all sums but the last stay within a thread.
    k = (tl.arange(0, BLOCK_K // 8)[:, None] * 8 + tl.arange(0, 8)[None, :])[:, None, None, :]
    w_row = weight_ptr + rows.to(tl.int64) * K
    w_ptrs = w_row[None, None, :, None] + k
    w = load_columns(w_ptrs, k, K, BLOCK_K <= K, "evict_first")
    if USE_PDL and PREFETCH > 0:
        prefetch(w_row + BLOCK_K, BLOCK_N, PREFETCH)

    gdc_wait(USE_PDL)
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, OUT_N)
    out_size = N // 2 if GATED else N
    inside = (m < M)[:, None] & (n < out_size)[None, :]
    out_offset = m[:, None].to(tl.int64) * out_stride + n[None, :]
    if ADD:
        residual = tl.load(residual_ptr + out_offset, mask=inside, other=0.0, cache_modifier=".cg")
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :, None, None] * x_stride + k
    acc = tl.zeros((BLOCK_K // 8, BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_K // 8, BLOCK_M, 1), tl.float32)
    for tile in tl.static_range(TILES):
        at = tile * BLOCK_K
        x = load_columns(x_ptrs + at, at + k, K, at + BLOCK_K <= K, "").to(tl.float32)
        if NORM:
            squares += tl.sum(x * x, 3)
            x *= load_columns(norm_weight_ptr + at + k, at + k, K, at + BLOCK_K <= K, "").to(tl.float32)
        wide = w.to(tl.float32)
        if tile + 1 < TILES:
            ahead = at + BLOCK_K
            w = load_columns(w_ptrs + ahead, ahead + k, K, ahead + BLOCK_K <= K, "evict_first")
        acc += tl.sum(x * wide, 3)

    y = tl.sum(acc, 0)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    if GATED:
        y = silu_mul_pairs(y, BLOCK_M, BLOCK_N)
    if ADD:
        y += residual.to(tl.float32)
    tl.store(out_ptr + out_offset, y.to(out_ptr.dtype.element_ty), mask=inside)
