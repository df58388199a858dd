"""What the two kernels of `linear` share: how a program reads the weight, and what becomes of its sums."""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def weight_rows(first, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``[BLOCK_N]`` of the weight behind the outputs from `first` on, none past the end.

    GATED: row i of the gate, which is the first half of the weight, and row i of the other half follow each other, so
    that a program holds both factors of its ``BLOCK_N // 2`` outputs.
    """
    j = tl.arange(0, BLOCK_N)
    if GATED:
        half = N // 2
        return tl.minimum(first + j // 2, half - 1) + (j % 2) * half
    return tl.minimum(first + j, N - 1)


@triton.jit
def load_columns(pointers, columns, K, WHOLE: tl.constexpr, EVICT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load what lies at `columns`, which broadcast to the pointers; zeros past column K; WHOLE: all exist."""
    if WHOLE:
        return tl.load(pointers, eviction_policy=EVICT)
    return tl.load(pointers, mask=columns < K, other=0.0, eviction_policy=EVICT)


@triton.jit
def prefetch(rows, ROWS: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring BYTES (a power of two, at least 256) behind each of ``[ROWS]`` pointers into the L2 cache; needs sm_90."""
    PIECES: tl.constexpr = min(max(tl_cuda.num_threads() // ROWS, 1), BYTES // 256)
    PIECE: tl.constexpr = BYTES // PIECES
    pointers = rows.to(tl.int64)[:, None] + (tl.arange(0, PIECES) * PIECE)[None, :]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers, tl.full(pointers.shape, PIECE, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def silu_mul_pairs(pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """``silu(gate) * up``: ``[BLOCK_M, BLOCK_N]`` of gates and ups in turn to ``[BLOCK_M, BLOCK_N // 2]``."""
    gate, up = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N // 2, 2)))
    return gate * up / (1.0 + tl.exp(-gate))
