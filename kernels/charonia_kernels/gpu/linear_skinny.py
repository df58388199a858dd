"""Linear layers of up to 128 rows: tensor cores, with the weight as their tall operand.

The product is computed transposed, ``y^T = W x^T``: a tile of the weight goes from memory through a pipeline in shared
memory straight into the tensor cores, and the few rows of x fill the short side.
"""

import triton
import triton.language as tl

from charonia_kernels.gpu._launch import gdc_launch_dependents, gdc_wait
from charonia_kernels.gpu.linear_tile import load_columns, prefetch, silu_mul_pairs, weight_rows


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    acc,
    squares,
    first,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    out_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Turn the sums ``[BLOCK_N, BLOCK_M]`` of a tile into outputs; squares ``[BLOCK_M]`` over a whole row of x."""
    y = tl.trans(acc)
    if NORM:
        y *= tl.rsqrt(squares / K + eps)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + weight_rows(first, N, BLOCK_N, GATED)).to(tl.float32)[None, :]
    if GATED:
        y = silu_mul_pairs(y, BLOCK_M, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N // 2 if GATED else BLOCK_N)
    inside = (m < M)[:, None] & (n < (N // 2 if GATED else N))[None, :]
    offset = m[:, None].to(tl.int64) * out_stride + n[None, :]
    if ADD:
        y += tl.load(residual_ptr + offset, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _share_sums(  # type: ignore[no-untyped-def]
    acc,
    squares,
    slot,
    partials_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
):
    """Write this program's sums into its slot."""
    base = partials_ptr + slot.to(tl.int64) * ((BLOCK_N + NORM) * BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    tl.store(base + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :], acc)
    if NORM:
        tl.store(base + BLOCK_N * BLOCK_M + m, squares)


@triton.jit
def _gather_sums(  # type: ignore[no-untyped-def]
    first_slot,
    partials_ptr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
):
    """Add up the slots of a tile, always in the same order."""
    SLOT: tl.constexpr = (BLOCK_N + NORM) * BLOCK_M
    base = partials_ptr + first_slot.to(tl.int64) * SLOT
    m = tl.arange(0, BLOCK_M)
    places = base + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(places + split * SLOT, cache_modifier=".cg")
        if NORM:
            squares += tl.load(base + split * SLOT + BLOCK_N * BLOCK_M + m, cache_modifier=".cg")
    return acc, squares


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(  # type: ignore[no-untyped-def]
    # Tensors: x [M, K], norm_weight [K], weight [N, K], bias [N], residual and out [M, N] (GATED: [M, N // 2]).
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    # SPLIT_K > 1: a slot of fp32 sums for each program; int32 zeros, one for each tile, which end as zeros.
    partials_ptr,
    arrivals_ptr,
    # Scalars.
    M,
    N,
    K,
    x_stride,
    out_stride,
    eps,
    # Tile.
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    WHOLE_K: tl.constexpr,
    # What is fused.
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program: all rows of x against BLOCK_N rows of the weight and one of SPLIT_K parts of their columns.

    Of the programs of a tile the last to arrive adds up the parts. WHOLE_K: BLOCK_K * SPLIT_K divides K. PREFETCH bytes
    of each row of the weight are on their way to the L2 cache before the wait.
    """
    gdc_launch_dependents(USE_PDL)
    slot = tl.program_id(0)
    tile = slot // SPLIT_K
    first = tile * (BLOCK_N // 2 if GATED else BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K * SPLIT_K)
    start = (slot % SPLIT_K) * steps * BLOCK_K
    w_row = weight_ptr + weight_rows(first, N, BLOCK_N, GATED).to(tl.int64) * K + start
    if USE_PDL and PREFETCH > 0:
        prefetch(w_row, BLOCK_N, PREFETCH)
    gdc_wait(USE_PDL)

    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_row[:, None] + k[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + (start + k)[None, :]
    if NORM:
        g_ptrs = norm_weight_ptr + (start + k)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    folded = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32)  # squares of x, eight columns in one
    for step in range(steps):
        at = step * BLOCK_K
        columns = (start + at + k)[None, :]
        if NORM:
            g = load_columns(g_ptrs + at, columns, K, WHOLE_K, "").to(tl.float32)
        w = load_columns(w_ptrs + at, columns, K, WHOLE_K, "evict_first")
        inside = (m < M)[:, None] if WHOLE_K else (m < M)[:, None] & (columns < K)
        x = tl.load(x_ptrs + at, mask=inside, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            folded += tl.sum(tl.reshape(wide * wide, (BLOCK_M, BLOCK_K // 8, 8)), 2)
            x = (wide * g).to(x.dtype)
        acc = tl.dot(w, tl.trans(x), acc)
    squares = tl.sum(folded, 1)

    if SPLIT_K > 1:
        _share_sums(acc, squares, slot, partials_ptr, BLOCK_M, BLOCK_N, NORM)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            tl.store(arrivals_ptr + tile, 0)
            acc, squares = _gather_sums(tile * SPLIT_K, partials_ptr, SPLIT_K, BLOCK_M, BLOCK_N, NORM)
            _finish(
                acc, squares, first, bias_ptr, residual_ptr, out_ptr, M, N, K, out_stride, eps,
                BLOCK_M, BLOCK_N, NORM, GATED, BIAS, ADD,
            )  # fmt: skip
    else:
        _finish(
            acc, squares, first, bias_ptr, residual_ptr, out_ptr, M, N, K, out_stride, eps,
            BLOCK_M, BLOCK_N, NORM, GATED, BIAS, ADD,
        )  # fmt: skip
