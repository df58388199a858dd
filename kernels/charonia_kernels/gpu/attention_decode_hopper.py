"""Decode attention on Hopper, for steps of single tokens: keys and values come before the kernel in front has ended.

In such a step all keys but each entry's newest were written by earlier steps (`AttentionPlan.only_newest_key_is_new`).
A program therefore reads its work item and block table and sends for its tiles while the QKV product and the rotary
embedding still run; what is left after them is the query, one key and one value:

    before the wait    item -> blocks -> K V K V ... into the rings     rows past the keys of the last tile zeroed
    after it           q, newest key and value -> newest score          a tile: K.q^T  softmax  V^T.p^T
    at the end         the result, or sums for the last program of the entry to add up

Keys and values are the tall operands of the tensor cores and queries the wide one: scores^T [TILE, N] = K [TILE, D] .
q^T, acc^T [D, N] += V^T [D, TILE] . p^T, so that N, the rows of queries padded to 8 or 16, is all that is wasted. The
newest key and value are no part of a tile but where the softmax starts from. The last tile has garbage in its place and
behind it: scores are masked, values zeroed.
"""

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from charonia_kernels.gpu._attention_decode_hopper_parts import (
    cap,
    combine,
    fetch_box,
    fetch_tile,
    load_few,
    pick,
    silence,
)
from charonia_kernels.gpu._gluon import LOG2_E, barrier, cache_descriptor, gdc_launch_dependents, gdc_wait
from charonia_kernels.gpu._launch import DeviceTraits
from charonia_kernels.gpu.attention_plan import AttentionPlan

SMALL_BATCH = 8
MAX_BATCH = 128
MAX_ROWS = 16
MIN_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class HopperDecodeConfig:
    """tile: keys of an iteration, a multiple of 64. key_stages, value_stages: tiles in flight. num_warps: 4, or 8 with
    a tile and a head of 128 at least. early: before the kernel in front has ended; without it everything comes after.
    """

    tile: int = 64
    key_stages: int = 2
    value_stages: int = 2
    num_warps: int = 4
    early: bool = True

    def shared_bytes(self, head_dim: int) -> int:
        """Of the rings."""
        head_pad: int = triton.next_power_of_2(head_dim)
        return 2 * (self.key_stages + self.value_stages) * self.tile * head_pad


def hopper_decode_config(batch: int, rows: int, head_dim: int) -> HopperDecodeConfig:
    """Measured on an H100 in a chain with the products around it (`benchmarks/gpu/attention_chain.py`).

    batch: entries. rows: query heads a key/value head. Rings of 32 to 64 kB: three programs share a multiprocessor, or
    one stands beside a program of a linear layer.
    """
    if head_dim > 128:
        return HopperDecodeConfig(64, 1, 1)
    if batch <= SMALL_BATCH:
        return HopperDecodeConfig(64 if rows <= 2 else 128, 1, 1)
    return HopperDecodeConfig(64, 2, 1)


def supported(
    batch: int,
    rows: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: DeviceTraits,
) -> bool:
    """Whether a batch of single query tokens, with `rows` heads a key/value head, is run here.

    Larger batches keep the memory busy without early copies, and the portable kernel is 5% quicker then.
    """
    return (
        device.capability == (9, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and cache_dtype == dtype
        and batch <= MAX_BATCH
        and rows <= MAX_ROWS
        and head_dim % 8 == 0
        and 32 < head_dim <= 256
        and block_size >= MIN_BLOCK_SIZE
    )


@gluon.jit(do_not_specialize=["table_stride"])
def decode_hopper_kernel(  # type: ignore[no-untyped-def]
    key_desc,  # over [num_blocks * NUM_KV_HEADS * BLOCK_SIZE, HEAD_DIM], boxes [BOX, HEAD_PAD]
    value_desc,
    q,  # [T, NUM_KV_HEADS * G, HEAD_DIM], tokens q_stride apart
    key_cache,  # what the descriptors are over
    value_cache,
    block_table,  # [num_rows, max_blocks] int32
    items,  # [num_items, 8] int32
    out,  # [T, NUM_KV_HEADS * G, HEAD_DIM]
    counters,
    partial_out,
    partial_stats,
    scale,
    q_stride,
    table_stride,
    NUM_KV_HEADS: gl.constexpr,
    G: gl.constexpr,
    N: gl.constexpr,  # G padded to 8 or 16
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SOFT_CAP: gl.constexpr,  # 0: none
    TILE: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    G_PAD: gl.constexpr,
    WIDTH: gl.constexpr,
    EARLY: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    """One work item and key/value head a program; grid (NUM_KV_HEADS, items). Every entry has one query token."""
    gdc_launch_dependents(USE_PDL)
    HEAD_PAD: gl.constexpr = key_desc.block_type.shape[1]
    BOX: gl.constexpr = key_desc.block_type.shape[0]
    BOXES: gl.constexpr = TILE // BOX
    STAGES: gl.constexpr = KEY_STAGES if KEY_STAGES > VALUE_STAGES else VALUE_STAGES
    FEW: gl.constexpr = triton.next_power_of_2(STAGES * BOXES)
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = key_desc.dtype
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_PAD, HEAD_PAD // 8], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    head, item = gl.program_id(0), gl.program_id(1)

    if not EARLY:
        gdc_wait(USE_PDL)
    eight: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    record = gl.load(items + item * 8 + gl.arange(0, 8, layout=eight), cache_modifier=".cg")
    count = pick(record, 7)
    if count == 0:
        # One program that waits is enough for "the kernel before me has ended" to hold for whoever is behind.
        if EARLY and item == 0:
            gdc_wait(USE_PDL)
        return
    begin, end, first_item = pick(record, 4), pick(record, 5), pick(record, 6)
    token = pick(record, 2).to(gl.int64)
    table = block_table + pick(record, 1).to(gl.int64) * table_stride
    # Keys [begin, limit) were written by earlier steps. The last item of an entry ends with its newest key.
    is_last = item == first_item + count - 1
    limit = end - is_last.to(gl.int32)
    tiles = gl.cdiv(limit - begin, TILE)
    last = tiles - 1
    blocks = load_few(table, FEW, BOX, BLOCK_SIZE, begin, limit)
    newest = gl.load(table + (end - 1) // BLOCK_SIZE, cache_modifier=".cg")

    keys = gl.allocate_shared_memory(dtype, [KEY_STAGES, TILE, HEAD_PAD], swizzled)
    values = gl.allocate_shared_memory(dtype, [VALUE_STAGES, TILE, HEAD_PAD], swizzled)
    queries = gl.allocate_shared_memory(dtype, [N, HEAD_PAD], swizzled)
    weights = gl.allocate_shared_memory(dtype, [N, TILE], swizzled)
    key_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], barriers)
    value_full = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], barriers)
    for slot in gl.static_range(KEY_STAGES):
        mbarrier.init(key_full.index(slot), count=BOXES)
    for slot in gl.static_range(VALUE_STAGES):
        mbarrier.init(value_full.index(slot), count=BOXES)
    fence_async_shared()
    barrier()
    for tile in gl.static_range(STAGES):
        for piece in gl.static_range(BOXES):
            block = pick(blocks, tile * BOXES + piece)
            key = begin + tile * TILE + piece * BOX
            if tile < KEY_STAGES:
                fetch_box(
                    key_desc, keys, key_full, tile, tile < tiles, key, limit, block, head,
                    piece, NUM_KV_HEADS, BLOCK_SIZE,
                )  # fmt: skip
            if tile < VALUE_STAGES:
                fetch_box(
                    value_desc, values, value_full, tile, tile < tiles, key, limit, block, head,
                    piece, NUM_KV_HEADS, BLOCK_SIZE,
                )  # fmt: skip
    is_partial = begin + tiles * TILE > limit
    if is_partial and last < VALUE_STAGES:
        mbarrier.wait(value_full.index(last), 0)
        silence(values.index(last), begin + last * TILE, limit)
    if SOFT_CAP == 0:
        scale = scale * LOG2_E
    if EARLY:
        gdc_wait(USE_PDL)

    line = gl.arange(0, N, layout=gl.SliceLayout(1, copied))
    column = gl.arange(0, HEAD_PAD, layout=gl.SliceLayout(0, copied))
    d = gl.arange(0, HEAD_PAD, layout=gl.SliceLayout(1, tall))
    r = gl.arange(0, N, layout=gl.SliceLayout(0, tall))
    place = token * q_stride + (head * G + line)[:, None] * HEAD_DIM + column[None, :]
    query = gl.load(
        q + place, mask=(line < G)[:, None] & (column < HEAD_DIM)[None, :], other=0.0, cache_modifier=".cg"
    )
    own = ((newest * NUM_KV_HEADS + head) * BLOCK_SIZE + (end - 1) % BLOCK_SIZE).to(gl.int64) * HEAD_DIM
    own_key = gl.load(
        key_cache + own + column, mask=is_last & (column < HEAD_DIM), other=0.0, cache_modifier=".cg"
    )
    own_value = gl.load(value_cache + own + d, mask=is_last & (d < HEAD_DIM), other=0.0, cache_modifier=".cg")
    queries.store(query)
    fence_async_shared()
    barrier()
    # Without tiles this multiplies whatever is there, for nobody.
    mbarrier.wait(key_full.index(0), 0, pred=tiles > 0)
    zeros = gl.zeros([TILE, N], gl.float32, tall)
    scores = warpgroup_mma(keys.index(0), queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
    own_score = gl.sum(query.to(gl.float32) * own_key.to(gl.float32)[None, :], axis=1)
    own_score = cap(gl.convert_layout(own_score, gl.SliceLayout(0, tall)), scale, SOFT_CAP)
    maximum = gl.where(is_last, own_score, float("-inf"))
    own_weight = gl.full([N], 1.0, gl.float32, gl.SliceLayout(0, tall)) * is_last.to(gl.float32)
    acc = gl.zeros([HEAD_PAD, N], gl.float32, tall) + own_value.to(gl.float32)[:, None]
    totals = gl.zeros([TILE, N], gl.float32, tall)
    lane = gl.arange(0, TILE, layout=gl.SliceLayout(1, tall))
    scores = warpgroup_mma_wait(0, deps=[scores])
    for tile in range(tiles):
        first = begin + tile * TILE
        # The block numbers of the tiles that will be sent for are on their way meanwhile.
        key_blocks = load_few(table, BOXES, BOX, BLOCK_SIZE, first + KEY_STAGES * TILE, limit)
        value_blocks = load_few(table, BOXES, BOX, BLOCK_SIZE, first + VALUE_STAGES * TILE, limit)
        scores = gl.where((first + lane < limit)[:, None], cap(scores, scale, SOFT_CAP), float("-inf"))
        new_maximum = gl.maximum(maximum, gl.max(scores, axis=0))
        fresh = gl.exp2(scores - new_maximum[None, :])
        shrink = gl.exp2(maximum - new_maximum)
        maximum = new_maximum
        weights.permute((1, 0)).store(fresh.to(dtype))
        fence_async_shared()
        barrier()  # all have multiplied the keys and written the weights
        if tile + KEY_STAGES < tiles:
            fetch_tile(
                key_desc, keys, key_full, tile + KEY_STAGES, begin, limit, key_blocks, head,
                NUM_KV_HEADS, BLOCK_SIZE,
            )  # fmt: skip
        totals = totals * shrink[None, :] + fresh
        own_weight = own_weight * shrink
        acc = acc * shrink[None, :]
        value_slot = tile % VALUE_STAGES
        mbarrier.wait(value_full.index(value_slot), (tile // VALUE_STAGES) & 1)
        if is_partial and tile == last and last >= VALUE_STAGES:
            silence(values.index(value_slot), first, limit)
        acc = warpgroup_mma(
            values.index(value_slot).permute((1, 0)), weights.permute((1, 0)), acc, is_async=True
        )
        acc = warpgroup_mma_wait(0, deps=[acc])
        if tile < last:
            barrier()  # all have multiplied the values and the weights
            if tile + VALUE_STAGES < tiles:
                fetch_tile(
                    value_desc, values, value_full, tile + VALUE_STAGES, begin, limit, value_blocks, head,
                    NUM_KV_HEADS, BLOCK_SIZE,
                )  # fmt: skip
            key_slot = (tile + 1) % KEY_STAGES
            mbarrier.wait(key_full.index(key_slot), ((tile + 1) // KEY_STAGES) & 1)
            zeros = gl.zeros([TILE, N], gl.float32, tall)
            scores = warpgroup_mma(
                keys.index(key_slot), queries.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(0, deps=[scores])
    total = gl.sum(totals, axis=0) + own_weight

    inside = (d < HEAD_DIM)[:, None] & (r < G)[None, :]
    within = r[None, :] * HEAD_DIM + d[:, None]
    result = out + (token * (NUM_KV_HEADS * G) + head * G) * HEAD_DIM
    if count == 1:
        gl.store(result + within, (acc * (1.0 / total)[None, :]).to(dtype), mask=inside)
    else:
        part = item * NUM_KV_HEADS + head
        stats = partial_stats + part * (2 * G) + r
        gl.store(stats, maximum, mask=r < G)
        gl.store(stats + G, total, mask=r < G)
        gl.store(partial_out + part.to(gl.int64) * (G * HEAD_DIM) + within, acc, mask=inside)
        barrier()  # all threads' writes come before the one thread's release
        counter = counters + first_item * NUM_KV_HEADS + head
        if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
            gl.store(counter, 0)
            combine(
                partial_out, partial_stats, first_item, count, head, result,
                NUM_KV_HEADS, G, G_PAD, HEAD_DIM, HEAD_PAD, WIDTH,
            )  # fmt: skip


def kernel_constants(group: int, head_dim: int, config: HopperDecodeConfig) -> dict[str, int | bool]:
    """What `decode_hopper_kernel` is specialised by besides the layout of the tensors."""
    padded, head_pad = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    sums = max(1, padded * head_pad // (32 * config.num_warps))  # a thread's of an item
    return {
        "G": group,
        "N": max(8, padded),
        "HEAD_DIM": head_dim,
        "TILE": config.tile,
        "KEY_STAGES": config.key_stages,
        "VALUE_STAGES": config.value_stages,
        "G_PAD": padded,
        "WIDTH": max(1, min(8, 32 // sums)),
        "EARLY": config.early,
    }


def launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: AttentionPlan,
    out: torch.Tensor,
    scale: float,
    soft_cap: float,
    config: HopperDecodeConfig,
    device: DeviceTraits,
) -> None:
    """Run `decode_hopper_kernel`; arguments as `decode_attention`'s, with 0 for no cap."""
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    shape = (num_blocks * num_kv_heads * block_size, head_dim, min(block_size, config.tile), q.dtype)
    space = plan.workspace
    decode_hopper_kernel[(num_kv_heads, plan.decode_slots)](
        cache_descriptor(key_cache.data_ptr(), *shape),
        cache_descriptor(value_cache.data_ptr(), *shape),
        q,
        key_cache,
        value_cache,
        block_table,
        space.decode_items,
        out,
        space.counters,
        space.partial_out,
        space.partial_stats,
        scale,
        q.stride(0),
        block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        SOFT_CAP=soft_cap,
        USE_PDL=device.has_pdl,
        **kernel_constants(plan.num_heads // num_kv_heads, head_dim, config),
        num_warps=config.num_warps,
        launch_pdl=device.has_pdl,
    )
