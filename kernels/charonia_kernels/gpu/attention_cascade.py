"""Attention of all decodes of a batch to the prefix that they share, so that it is read once and not once an entry.

The query rows of all entries are packed into tiles: row r of the batch is (entry r // R, row r % R of the entry), with
R as in `attention_plan.py`. The prefix is cut into chunks, whose sums go to the workspace; `decode_kernel` takes them
in with the first item of each entry. Source: Ye et al., "Cascade inference: memory bandwidth efficient shared prefix
batch decoding" (2024).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._attention_keys import attend_keys, for_cache
from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits
from charonia_kernels.gpu.attention_plan import AttentionPlan


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """rows: packed query rows of a program. tile: keys of a loop iteration."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


def cascade_config(
    shared_rows: int, head_dim: int, cache_itemsize: int, device: DeviceTraits
) -> CascadeConfig:
    """Launch parameters; `shared_rows` is the plan's, which has chosen the number of chunks by it.

    Shared memory holds the queries, and as many tiles of keys and values as there are stages: on Hopper the products
    read them there while the next ones come. Products of fp32 are no work for tensor cores, and, as keys that are
    converted, take registers by the tile.
    """
    head_pad = triton.next_power_of_2(head_dim)
    rows, tile, num_stages = shared_rows, 64, 3
    if cache_itemsize == 4:
        rows, tile = min(rows, 64 if head_pad <= 128 else 32), 16
    elif cache_itemsize == 1 and head_pad > 128:
        rows = min(rows, 64)
    used = rows * head_pad * max(2, cache_itemsize)
    while tile > 16 and used + num_stages * 2 * tile * head_pad * cache_itemsize > (
        device.max_shared_bytes - 16_384
    ):
        tile //= 2
    wide = rows * head_pad >= 128 * 128 or (cache_itemsize == 4 and head_pad > 128)
    return CascadeConfig(rows, tile, 8 if wide else 4, num_stages)


@triton.jit(do_not_specialize=["table_stride", "batch"])
def cascade_kernel(  # type: ignore[no-untyped-def]
    # pointers
    q,  # [T, NUM_KV_HEADS * G, HEAD_DIM], tokens q_stride apart
    key_cache,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM], blocks block_stride apart
    value_cache,
    block_table,  # [num_rows, max_blocks] int32
    k_scale,  # one fp32, or None
    entries,
    prefix_info,
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
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of rows, chunk of the prefix and key/value head a program; grid (NUM_KV_HEADS, tiles, chunks)."""
    gdc_wait(USE_PDL)
    gdc_launch_dependents(USE_PDL)
    kv_head, tile, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prefix, chunk_keys = tl.load(prefix_info), tl.load(prefix_info + 2)
    begin = chunk * chunk_keys
    if begin >= prefix:
        return
    end = tl.minimum(begin + chunk_keys, prefix)
    if SOFT_CAP == 0:
        scale = scale * 1.4426950408889634
    if k_scale is not None:
        scale = scale * tl.load(k_scale)

    line = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_PAD)
    entry, row = line // R, line % R
    real = entry < batch
    first = tl.load(entries + entry * 4, mask=real, other=0)
    queries = tl.load(entries + entry * 4 + 1, mask=real, other=0)
    live = row < queries * G
    mask = live[:, None] & (column < HEAD_DIM)[None, :]
    token = (first + row // G).to(tl.int64)
    place = token[:, None] * q_stride + ((kv_head * G + row % G) * HEAD_DIM)[:, None] + column[None, :]
    query = for_cache(tl.load(q + place, mask=mask, other=0.0), key_cache)

    position, lowest = line, 0
    if WINDOW > 0:
        position = tl.load(entries + entry * 4 + 2, mask=real, other=0) + row // G
        # Keys that no row of the tile sees may hold NaN.
        lowest = tl.min(tl.where(live, position, 2147483647), 0) - WINDOW + 1
        begin = tl.maximum(begin, tl.minimum(lowest // TILE * TILE, end))
    table = block_table + tl.load(prefix_info + 1).to(tl.int64) * table_stride
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    head_offset = kv_head * (BLOCK_SIZE * HEAD_DIM)
    maximum, total, acc = attend_keys(
        query, key_cache + head_offset, value_cache + head_offset, table, block_stride, scale, begin, end, lowest,
        position, maximum, total, acc, HEAD_DIM, BLOCK_SIZE, False, WINDOW, SOFT_CAP, TILE,
    )  # fmt: skip
    part = ((chunk * batch + entry) * NUM_KV_HEADS + kv_head).to(tl.int64)
    stats = shared_stats + part * (2 * R) + row
    tl.store(stats, maximum, mask=live)
    tl.store(stats + R, total, mask=live)
    target = shared_out + (part * (R * HEAD_DIM) + row * HEAD_DIM)[:, None] + column[None, :]
    tl.store(target, acc, mask=mask)


def cascade_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    *,
    config: CascadeConfig | None = None,
) -> None:
    """Attend the decodes of a plan with has_cascade to their shared prefix, into the plan's workspace.

    `decode_attention` of the same layer comes next; arguments are as there.
    """
    if not plan.has_cascade or plan.decode_slots == 0:
        return
    device, space = traits(q.device), plan.workspace
    rows = plan.rows_per_entry
    if config is None:
        itemsize = key_cache.element_size()
        config = cascade_config(plan.split.shared_rows, plan.head_dim, itemsize, device)
    tiles = -(-plan.batch * rows // config.rows)
    cascade_kernel[(plan.num_kv_heads, tiles, plan.shared_chunks(device.num_sms))](
        q,
        key_cache,
        value_cache,
        block_table,
        k_scale,
        space.entries,
        space.prefix,
        space.shared_out,
        space.shared_stats,
        scale,
        q.stride(0),
        key_cache.stride(0),
        block_table.stride(0),
        plan.batch,
        NUM_KV_HEADS=plan.num_kv_heads,
        G=plan.num_heads // plan.num_kv_heads,
        HEAD_DIM=plan.head_dim,
        HEAD_PAD=triton.next_power_of_2(plan.head_dim),
        BLOCK_SIZE=plan.block_size,
        R=rows,
        WINDOW=sliding_window or 0,
        SOFT_CAP=soft_cap or 0.0,
        ROWS=config.rows,
        TILE=config.tile,
        USE_PDL=device.has_pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=device.has_pdl,
    )
