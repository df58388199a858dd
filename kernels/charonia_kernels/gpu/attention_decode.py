"""Attention of a few query tokens a sequence over the paged KV cache, divided along the keys (flash decoding).

One program takes a work item (`attention_plan.py`) and a key/value head. All query heads of the group and all query
tokens of the entry are the rows of one tile, so that keys and values are read once (grouped-query packing):

    row r = (query token r // G, query head kv_head * G + r % G)        scores [ROWS, TILE]        acc [ROWS, head_dim]

An entry of one item is written at once. Otherwise each program leaves its sums in the workspace, and the last one to
finish, found by a counter, adds them up in the order of the items: the result does not depend on who was last. Sources:
Dao et al., "Flash-Decoding for long-context inference" (2023).

On Hopper, steps of single tokens have a kernel of their own with the same inputs (`attention_decode_hopper.py`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu import attention_decode_hopper as hopper
from charonia_kernels.gpu._attention_keys import attend_keys, for_cache
from charonia_kernels.gpu._launch import INTERPRETED, DeviceTraits, gdc_launch_dependents, gdc_wait, traits
from charonia_kernels.gpu.attention_decode_hopper import HopperDecodeConfig, hopper_decode_config
from charonia_kernels.gpu.attention_plan import AttentionPlan

Variant = Literal["portable", "hopper"]


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """tile: keys of a loop iteration. num_stages: tiles of keys and values in flight, and one."""

    tile: int
    num_warps: int
    num_stages: int


def decode_config(
    rows: int, head_dim: int, block_size: int, cache_itemsize: int, device: DeviceTraits
) -> DecodeConfig:
    """Launch parameters, of the model and the cache's layout alone.

    Keys and values in flight take about 64 kB a program, of which three fit a multiprocessor of an H100. Products of
    fp32 are not tensor core work, and larger tiles of them do not fit the registers.
    """
    head_pad = triton.next_power_of_2(head_dim)
    in_flight = min(65_536, device.max_shared_bytes // 3)
    tile = 16 if cache_itemsize == 4 else 64
    while tile > 16 and 2 * tile * 2 * head_pad * cache_itemsize > in_flight:
        tile //= 2
    num_stages = 1 + min(4, in_flight // (tile * 2 * head_pad * cache_itemsize))
    sums = max(16, triton.next_power_of_2(rows)) * head_pad
    num_warps = 8 if sums >= 64 * 128 else 4
    if cache_itemsize == 1 and sums <= 16 * 128:
        num_warps = 2  # measured on an H100: 2.5 TB/s, 2.1 with four; larger sums do not fit their registers
    return DecodeConfig(tile, num_warps, max(2, num_stages))


def decode_variant(
    plan: AttentionPlan,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    sliding_window: int | None,
    device: DeviceTraits,
    portable: bool = INTERPRETED,
) -> Variant:
    """Which kernel attends the decodes of a plan. portable: no instructions of one architecture."""
    rows = plan.rows_per_entry
    if (
        not portable
        and plan.only_newest_key_is_new
        and plan.max_decode_query_len == 1
        and not plan.has_cascade
        and not sliding_window
        and hopper.supported(plan.batch, rows, plan.head_dim, plan.block_size, dtype, cache_dtype, device)
    ):
        return "hopper"
    return "portable"


def combine_width(rows_pad: int, head_pad: int, num_warps: int) -> int:
    """Items that an iteration of `_combine` takes: 32 sums a thread, fewer where rows are many, so that it is not what
    the kernel needs registers for.
    """
    sums = 32 if rows_pad < 16 else 16
    return max(1, min(8, sums * 32 * num_warps // (rows_pad * head_pad)))


@triton.jit
def _merge_shared(  # type: ignore[no-untyped-def]
    maximum, total, acc, shared_out, shared_stats, num_chunks, chunk_stride, place, live,
    R: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Take in what the shared-prefix kernel found. place: of the entry and head among those of a chunk."""
    row = tl.arange(0, acc.shape[0])
    column = tl.arange(0, acc.shape[1])
    mask = live[:, None] & (column < HEAD_DIM)[None, :]
    for chunk in tl.range(0, num_chunks):
        part = (chunk * chunk_stride + place).to(tl.int64)
        stats = shared_stats + part * (2 * R) + row
        part_maximum = tl.load(stats, mask=live, other=float("-inf"))
        part_total = tl.load(stats + R, mask=live, other=0.0)
        part_acc = tl.load(
            shared_out + part * (R * HEAD_DIM) + row[:, None] * HEAD_DIM + column[None, :],
            mask=mask,
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, part_maximum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2(maximum - shift)
        weight = tl.exp2(part_maximum - shift)
        total = total * shrink + part_total * weight
        acc = acc * shrink[:, None] + part_acc * weight[:, None]
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    partial_out, partial_stats, first, count, kv_head, num_rows, NUM_KV_HEADS: tl.constexpr,
    R: tl.constexpr, R_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[R_PAD, HEAD_PAD] fp32: attention over all items of an entry, WIDTH of them an iteration."""
    row = tl.arange(0, R_PAD)
    column = tl.arange(0, HEAD_PAD)
    step = tl.arange(0, WIDTH)
    live = row < num_rows
    maximum = tl.full([R_PAD], float("-inf"), tl.float32)
    total = tl.zeros([R_PAD], tl.float32)
    acc = tl.zeros([R_PAD, HEAD_PAD], tl.float32)
    for start in tl.range(0, count, WIDTH):
        part = ((first + start + step) * NUM_KV_HEADS + kv_head).to(tl.int64)
        exists = (start + step < count)[:, None] & live[None, :]
        # Past this multiprocessor's own cache: others have just written these.
        stats = partial_stats + part[:, None] * (2 * R) + row[None, :]
        part_maximum = tl.load(stats, mask=exists, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stats + R, mask=exists, other=0.0, cache_modifier=".cg")
        offsets = part[:, None, None] * (R * HEAD_DIM) + row[None, :, None] * HEAD_DIM + column[None, None, :]
        part_acc = tl.load(
            partial_out + offsets,
            mask=exists[:, :, None] & (column < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = tl.maximum(maximum, tl.max(part_maximum, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weight = tl.exp2(part_maximum - shift[None, :])
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(part_total * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(part_acc * weight[:, :, None], 0)
        maximum = new_maximum
    return acc * _inverse(total)[:, None]


@triton.jit
def _inverse(total):  # type: ignore[no-untyped-def]
    """1 / total, and 0 for a row that saw no key."""
    return tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    values, out, first, kv_head, num_rows,
    NUM_KV_HEADS: tl.constexpr, G: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write the rows of an entry's query tokens, the first of which is `first`, to out [T, num_heads, HEAD_DIM]."""
    row = tl.arange(0, values.shape[0])
    column = tl.arange(0, values.shape[1])
    token = (first + row // G).to(tl.int64)
    place = (token * (NUM_KV_HEADS * G) + kv_head * G + row % G) * HEAD_DIM
    mask = (row < num_rows)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + place[:, None] + column[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_stride", "batch"])
def decode_kernel(  # type: ignore[no-untyped-def]
    # pointers
    q,  # [T, NUM_KV_HEADS * G, HEAD_DIM], tokens q_stride apart
    key_cache,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM], blocks block_stride apart
    value_cache,
    block_table,  # [num_rows, max_blocks] int32
    items,  # [num_items, 8] int32
    out,  # [T, NUM_KV_HEADS * G, HEAD_DIM]
    k_scale,  # one fp32, or None
    v_scale,
    counters,
    partial_out,
    partial_stats,
    prefix_info,  # this and the next are None without HAS_CASCADE
    shared_out,
    shared_stats,
    # scalars
    scale,
    q_stride,
    block_stride,
    table_stride,
    batch,
    # constants
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    R: tl.constexpr,  # G * most query tokens
    R_PAD: tl.constexpr,
    ROWS: tl.constexpr,  # max(16, R_PAD)
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_CASCADE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One work item and key/value head a program; grid (NUM_KV_HEADS, items)."""
    gdc_wait(USE_PDL)
    gdc_launch_dependents(USE_PDL)
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    record = items + item * 8
    count = tl.load(record + 7)
    if count == 0:
        return
    entry, table_row, first = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    queries, begin, end = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    first_item = tl.load(record + 6)
    if SOFT_CAP == 0:
        scale = scale * 1.4426950408889634
    if k_scale is not None:
        scale = scale * tl.load(k_scale)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_PAD)
    num_rows = queries * G
    live = row < num_rows
    token = (first + row // G).to(tl.int64)
    query_place = token[:, None] * q_stride + ((kv_head * G + row % G) * HEAD_DIM)[:, None] + column[None, :]
    query_mask = live[:, None] & (column < HEAD_DIM)[None, :]
    query = for_cache(tl.load(q + query_place, mask=query_mask, other=0.0), key_cache)

    position, lowest = row, 0
    if R > G or WINDOW > 0:
        # The end of the last item is the entry's length.
        length = tl.load(record + (first_item + count - 1 - item) * 8 + 5)
        position = length - queries + row // G
        if WINDOW > 0:
            lowest = length - queries - WINDOW + 1
            begin = tl.maximum(begin, lowest // TILE * TILE)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    if HAS_CASCADE:
        num_chunks = tl.where(item == first_item, tl.load(prefix_info + 3), 0)
        maximum, total, acc = _merge_shared(
            maximum, total, acc, shared_out, shared_stats, num_chunks, batch * NUM_KV_HEADS,
            entry * NUM_KV_HEADS + kv_head, live, R, HEAD_DIM,
        )  # fmt: skip
    head_offset = kv_head * (BLOCK_SIZE * HEAD_DIM)
    maximum, total, acc = attend_keys(
        query, key_cache + head_offset, value_cache + head_offset, block_table + table_row.to(tl.int64) * table_stride,
        block_stride, scale, begin, end, lowest, position, maximum, total, acc,
        HEAD_DIM, BLOCK_SIZE, R > G, WINDOW, SOFT_CAP, TILE,
    )  # fmt: skip
    factor = 1.0
    if v_scale is not None:
        factor = tl.load(v_scale)
    if count == 1:
        result = acc * (_inverse(total) * factor)[:, None]
        _store_rows(result, out, first, kv_head, num_rows, NUM_KV_HEADS, G, HEAD_DIM)
    else:
        part = item * NUM_KV_HEADS + kv_head
        stats = partial_stats + part * (2 * R) + row
        tl.store(stats, maximum, mask=live)
        tl.store(stats + R, total, mask=live)
        place = part.to(tl.int64) * (R * HEAD_DIM) + (row * HEAD_DIM)[:, None] + column[None, :]
        tl.store(partial_out + place, acc, mask=query_mask)
        # All threads' writes come before the one thread's release.
        tl.debug_barrier()
        counter = counters + first_item * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
            tl.store(counter, 0)
            result = _combine(
                partial_out, partial_stats, first_item, count, kv_head, num_rows,
                NUM_KV_HEADS, R, R_PAD, HEAD_DIM, HEAD_PAD, WIDTH,
            )  # fmt: skip
            _store_rows(result * factor, out, first, kv_head, num_rows, NUM_KV_HEADS, G, HEAD_DIM)


def decode_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: AttentionPlan,
    out: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    config: DecodeConfig | HopperDecodeConfig | None = None,
) -> None:
    """Attend the query tokens of the plan's decode items; other rows of `out` are left alone.

    Args:
        q: ``[T, num_heads, head_dim]``, dense but for its first dimension.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, each block contiguous; of q's dtype or
            float8_e4m3fn.
        value_cache: as ``key_cache``, with the same strides.
        block_table: ``[num_rows, max_blocks]`` int32, rows contiguous.
        plan: filled by `build_plan`; with has_cascade, `cascade_attention` of this layer has been launched before.
        out: ``[T, num_heads, head_dim]``, contiguous, of q's dtype.
        scale: multiplies the scores.
        sliding_window: a query at position p sees keys at positions > p - sliding_window.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
        k_scale: one fp32: what stored keys are multiplied by.
        v_scale: the same of values.
        config: instead of what `decode_variant`, and `decode_config` or `hopper_decode_config`, find best.
    """
    if plan.decode_slots == 0:
        return
    device, space = traits(q.device), plan.workspace
    num_kv_heads, head_dim, rows = plan.num_kv_heads, plan.head_dim, plan.rows_per_entry
    if config is None and decode_variant(plan, q.dtype, key_cache.dtype, sliding_window, device) == "hopper":
        config = hopper_decode_config(plan.batch, rows, head_dim)
    if isinstance(config, HopperDecodeConfig):
        tensors = q, key_cache, value_cache, block_table
        hopper.launch(*tensors, plan, out, scale, soft_cap or 0.0, config, device)
        return
    config = config or decode_config(rows, head_dim, plan.block_size, key_cache.element_size(), device)
    head_pad, rows_pad = triton.next_power_of_2(head_dim), triton.next_power_of_2(rows)
    decode_kernel[(num_kv_heads, plan.decode_slots)](
        q,
        key_cache,
        value_cache,
        block_table,
        space.decode_items,
        out,
        k_scale,
        v_scale,
        space.counters,
        space.partial_out,
        space.partial_stats,
        space.prefix if plan.has_cascade else None,
        space.shared_out if plan.has_cascade else None,
        space.shared_stats if plan.has_cascade else None,
        scale,
        q.stride(0),
        key_cache.stride(0),
        block_table.stride(0),
        plan.batch,
        NUM_KV_HEADS=num_kv_heads,
        G=plan.num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        BLOCK_SIZE=plan.block_size,
        R=rows,
        R_PAD=rows_pad,
        ROWS=max(16, rows_pad),
        WINDOW=sliding_window or 0,
        SOFT_CAP=soft_cap or 0.0,
        HAS_CASCADE=plan.has_cascade,
        TILE=config.tile,
        WIDTH=combine_width(rows_pad, head_pad, config.num_warps),
        USE_PDL=device.has_pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=device.has_pdl,
    )
