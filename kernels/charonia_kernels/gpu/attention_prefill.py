"""Causal attention of prompt tiles over the paged KV cache: launch heuristics, the launcher, and the portable kernel.

FlashAttention-2 (Dao, 2023) with the query heads of a key/value head packed into the rows of one tile: row m of a tile
is token ``m // G`` and head ``kv_head * G + m % G``, so that each key is read once for all G heads. A tile walks over
its keys in order: those that all of its queries see take no mask; the diagonal, and the lower edge of a sliding
window, do.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu import attention_prefill_hopper as hopper
from charonia_kernels.gpu._launch import INTERPRETED, DeviceTraits, gdc_launch_dependents, gdc_wait, traits

LOG2_E = tl.constexpr(math.log2(math.e))
ITEM_ROWS = 128
"""Most rows of a work item: query tokens times G. The same everywhere, so that work lists depend on G alone."""
HEAD_DIMS = (64, 80, 96, 128, 256)
Variant = Literal["portable", "hopper"]


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How a work item is computed.

    block_m: rows of a program's tile; programs share the rows of an item. block_n: keys of an iteration. stages: key
    and value tiles in flight. num_warps: of the portable kernel. ping_pong: the two warpgroups of the Hopper kernel
    take turns.
    """

    variant: Variant
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    ping_pong: bool = False


def prefill_tile_tokens(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Most query tokens that a work item may have."""
    return ITEM_ROWS // (num_heads // num_kv_heads)


def prefill_config(
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: DeviceTraits,
    portable: bool = INTERPRETED,
) -> PrefillConfig:
    """The fastest known way for these shapes that fits the device. portable: no instructions of one architecture."""
    if not portable and hopper.supported(head_dim, block_size, dtype, cache_dtype, device):
        return PrefillConfig("hopper", ITEM_ROWS, 128, 4, 2)
    narrow = head_dim <= 128
    if dtype == torch.float32:
        return PrefillConfig("portable", 32, 32, 4, 1) if narrow else PrefillConfig("portable", 16, 16, 4, 1)
    if cache_dtype != dtype:
        return PrefillConfig("portable", ITEM_ROWS, 64 if narrow else 32, 8, 2)
    if device.capability >= (9, 0):
        return PrefillConfig("portable", ITEM_ROWS, 128 if narrow else 64, 8, 2)
    return PrefillConfig("portable", ITEM_ROWS if narrow else 64, 64, 8, 2)


@triton.jit
def _softmax_step(  # type: ignore[no-untyped-def]
    scores,  # [BLOCK_M, BLOCK_N] fp32, products of queries and keys
    maximum,  # [BLOCK_M] fp32, in base-2 units
    total,  # [BLOCK_M] fp32
    scale,  # softmax scale * log2(e), or without the log with a soft cap
    visible,  # [BLOCK_M, BLOCK_N] bool; read if MASKED
    MASKED: tl.constexpr,
    ROWS_MAY_BE_BLIND: tl.constexpr,  # a row may have seen no key so far
    SOFT_CAP: tl.constexpr,
):
    """One tile of the running softmax: weights, what the sum so far shrinks by, the new maximum and total."""
    if SOFT_CAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities.
        doubled = tl.exp2(scores * (scale * (2.0 * LOG2_E / SOFT_CAP)))
        scores = (SOFT_CAP * LOG2_E) * (1.0 - 2.0 / (1.0 + doubled))
        scale = 1.0
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
    shift = new_maximum
    if ROWS_MAY_BE_BLIND:
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(maximum - shift)
    return weights, shrink, new_maximum, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M, HEAD_PAD] fp32
    maximum,
    total,
    q,  # [BLOCK_M, HEAD_PAD]
    position,  # [BLOCK_M] int32, of each row's token
    key_ptr,  # at the head's part of block 0
    value_ptr,
    table_ptr,  # at the sequence's row
    block_stride,  # int64, elements from block to block
    scale,
    start,  # first key, a multiple of BLOCK_N
    stop,  # past the last key; a multiple of BLOCK_N unless MASKED
    first_key,  # the first key that any query of the tile sees
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend to keys [start, stop)."""
    HEAD_PAD: tl.constexpr = q.shape[1]
    lane = tl.arange(0, BLOCK_N)
    column = tl.arange(0, HEAD_PAD)
    precision: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "tf32"
    # Entries of the table are read an iteration ahead of the copies that need them.
    index = lane // BLOCK_SIZE if BLOCK_SIZE < BLOCK_N else 0
    entry = tl.load(table_ptr + start // BLOCK_SIZE + index, mask=start + index * BLOCK_SIZE < stop, other=0)
    for tile in tl.range(start, stop, BLOCK_N):
        block = entry.to(tl.int64)
        following = tile + BLOCK_N
        entry = tl.load(
            table_ptr + following // BLOCK_SIZE + index, mask=following + index * BLOCK_SIZE < stop, other=0
        )
        if BLOCK_SIZE < BLOCK_N:
            rows = block * block_stride + (lane % BLOCK_SIZE) * HEAD_DIM
        else:
            rows = block * block_stride + (tile % BLOCK_SIZE) * HEAD_DIM + lane * HEAD_DIM
        offsets = rows[:, None] + column[None, :]
        key = tile + lane
        if MASKED:
            # Slots that no query sees may hold NaN, and weight zero would not silence them.
            exists = (key >= first_key) & (key < stop)
            mask = exists[:, None] & (column < HEAD_DIM)[None, :]
            keys = tl.load(key_ptr + offsets, mask=mask, other=0.0)
            values = tl.load(value_ptr + offsets, mask=mask, other=0.0)
            visible = (key[None, :] <= position[:, None]) & exists[None, :]
            if WINDOW > 0:
                visible = visible & (key[None, :] > position[:, None] - WINDOW)
        else:
            visible = True
            if HEAD_DIM == HEAD_PAD:
                keys = tl.load(key_ptr + offsets)
                values = tl.load(value_ptr + offsets)
            else:
                keys = tl.load(key_ptr + offsets, mask=(column < HEAD_DIM)[None, :], other=0.0)
                values = tl.load(value_ptr + offsets, mask=(column < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q, keys.to(q.dtype).T, input_precision=precision)
        weights, shrink, maximum, total = _softmax_step(
            scores, maximum, total, scale, visible, MASKED, WINDOW > 0, SOFT_CAP
        )
        acc = tl.dot(
            weights.to(q.dtype), values.to(q.dtype), acc * shrink[:, None], input_precision=precision
        )
    return acc, maximum, total


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [T, num_heads, HEAD_DIM]
    key_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_ptr,
    table_ptr,  # [num_rows, max_blocks] int32
    items_ptr,  # [num_items, 4] int32
    out_ptr,  # [T, num_heads, HEAD_DIM]
    k_scale_ptr,  # one fp32, or None
    v_scale_ptr,
    scale,
    q_stride,
    out_stride,
    table_stride,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,  # the next power of two
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFT_CAP: tl.constexpr,  # 0: none
    ITEM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # divides ITEM_ROWS
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BLOCK_M rows of a work item, for one key/value head; grid (items, num_kv_heads, ITEM_ROWS / BLOCK_M)."""
    gdc_wait(USE_PDL)
    gdc_launch_dependents(USE_PDL)
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    count = tl.load(item + 2)
    above = tl.program_id(2) * BLOCK_M
    if count * G <= above:
        return
    row, first, begin = tl.load(item), tl.load(item + 1), tl.load(item + 3)
    head, num_kv_heads = tl.program_id(1), tl.num_programs(1)

    line = above + tl.arange(0, BLOCK_M)
    column = tl.arange(0, HEAD_PAD)
    token, query_head = line // G, head * G + line % G
    live = (token < count) & (line < ITEM_ROWS // G * G)
    mask = live[:, None] & (column < HEAD_DIM)[None, :]
    within = query_head[:, None] * HEAD_DIM + column[None, :]
    flat = (first + token).to(tl.int64)[:, None]
    q = tl.load(q_ptr + flat * q_stride + within, mask=mask, other=0.0)
    position = begin + token

    if SOFT_CAP == 0:
        scale = scale * LOG2_E
    if k_scale_ptr is not None:
        scale = scale * tl.load(k_scale_ptr)
    head_offset = head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    block_stride = num_kv_heads.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    key_ptr += head_offset
    value_ptr += head_offset
    table_ptr += row.to(tl.int64) * table_stride

    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = begin + tl.minimum(count, (above + BLOCK_M - 1) // G + 1)
    begin += above // G
    # Keys [plain, diagonal) are seen by every query of the tile.
    diagonal = (begin + 1) // BLOCK_N * BLOCK_N
    plain, first_key = 0, 0
    if WINDOW > 0:
        first_key = tl.maximum(begin - WINDOW + 1, 0)
        plain = tl.minimum(tl.cdiv(tl.maximum(stop - WINDOW, 0), BLOCK_N) * BLOCK_N, diagonal)
        acc, maximum, total = _attend(
            acc, maximum, total, q, position, key_ptr, value_ptr, table_ptr, block_stride, scale,
            first_key // BLOCK_N * BLOCK_N, plain, first_key, True, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, BLOCK_N,
        )  # fmt: skip
    acc, maximum, total = _attend(
        acc, maximum, total, q, position, key_ptr, value_ptr, table_ptr, block_stride, scale,
        plain, diagonal, first_key, False, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, BLOCK_N,
    )  # fmt: skip
    acc, maximum, total = _attend(
        acc, maximum, total, q, position, key_ptr, value_ptr, table_ptr, block_stride, scale,
        diagonal, stop, first_key, True, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, BLOCK_N,
    )  # fmt: skip

    factor = 1.0 / total
    if v_scale_ptr is not None:
        factor *= tl.load(v_scale_ptr)
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + flat * out_stride + within, out, mask=mask)


def prefill_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prefill_items: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    config: PrefillConfig | None = None,
) -> None:
    """Attend the query tokens of `prefill_items` to the keys of their sequences up to their own positions.

    Args:
        q: ``[T, num_heads, head_dim]``, dense but for its first dimension.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, contiguous; of q's dtype or float8_e4m3fn.
        value_cache: as ``key_cache``.
        block_table: ``[num_rows, max_blocks]`` int32.
        prefill_items: ``[num_items, 4]`` int32: table row, first flat query token, number of query tokens (0: nothing
            to do; at most `prefill_tile_tokens`), position of the first query token.
        out: ``[T, num_heads, head_dim]``, as q; other tokens' rows are left alone.
        scale: positive; multiplies the scores.
        sliding_window: a query at position p sees keys at positions > p - sliding_window.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
        k_scale: one fp32: what stored keys are multiplied by.
        v_scale: the same of values.
        config: instead of what `prefill_config` finds best.
    """
    _check(q, key_cache, value_cache, out, prefill_items, scale)
    block_size, head_dim = key_cache.shape[2:]
    if prefill_items.shape[0] == 0 or q.shape[0] == 0:
        return
    device = traits(q.device)
    if config is None:
        config = prefill_config(head_dim, block_size, q.dtype, key_cache.dtype, device)
    if key_cache.dtype != q.dtype and device.capability < (8, 9):
        raise ValueError("fp8 caches need compute capability 8.9")
    window, cap = sliding_window or 0, soft_cap or 0.0
    tensors = (q, key_cache, value_cache, block_table, prefill_items, out)
    if config.variant == "hopper":
        hopper.launch(*tensors, scale, window, cap, config, device)
    else:
        _launch_portable(*tensors, scale, window, cap, k_scale, v_scale, config, device)


def _launch_portable(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prefill_items: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    config: PrefillConfig,
    device: DeviceTraits,
) -> None:
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    prefill_kernel[(prefill_items.shape[0], num_kv_heads, ITEM_ROWS // config.block_m)](
        q,
        key_cache,
        value_cache,
        block_table,
        prefill_items,
        out,
        k_scale,
        v_scale,
        scale,
        q.stride(0),
        out.stride(0),
        block_table.stride(0),
        G=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        ITEM_ROWS=ITEM_ROWS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        USE_PDL=device.has_pdl,
        num_warps=config.num_warps,
        num_stages=config.stages,
        launch_pdl=device.has_pdl,
    )


def _check(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    prefill_items: torch.Tensor,
    scale: float,
) -> None:
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    if head_dim not in HEAD_DIMS or q.shape[2] != head_dim:
        raise ValueError(f"head_dim {head_dim} (q: {q.shape[2]}) is not one of {HEAD_DIMS}")
    if q.shape[1] % num_kv_heads or q.shape[1] // num_kv_heads > 16:
        raise ValueError(f"{q.shape[1]} heads are not 1 to 16 times {num_kv_heads} key/value heads")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size {block_size} is not a power of two from 16 to 128")
    if key_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a cache of {key_cache.dtype} does not go with queries of {q.dtype}")
    if not (
        key_cache.is_contiguous() and value_cache.is_contiguous() and value_cache.shape == key_cache.shape
    ):
        raise ValueError("key_cache and value_cache must be contiguous and of one shape")
    if q.stride(1) != head_dim or out.stride(1) != head_dim or q.stride(2) != 1 or out.stride(2) != 1:
        raise ValueError("q and out must be dense but for their first dimension")
    if prefill_items.shape[1:] != (4,) or not scale > 0:
        raise ValueError(f"prefill_items must be [n, 4], and scale positive: {prefill_items.shape}, {scale}")
