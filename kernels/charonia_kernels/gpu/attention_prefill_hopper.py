"""Attention of prompt tiles on Hopper: a copying warp and two warpgroups of tensor core work.

After FlashAttention-3 (Shah et al., 2024). One warp copies key and value tiles into rings in
shared memory, a box of the paged cache at a time. Each warpgroup owns half of the query rows; it issues the scores of a
tile before it weighs the values of the tile before, so that the tensor cores work through its softmax:

    scores(0)  softmax(0) | scores(1) values(0) softmax(1) | scores(2) values(1) softmax(2) | ... | values(n - 1)

With PING_PONG the warpgroups take turns at issuing, so that one's softmax runs beside the other's products.
"""

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from charonia_kernels.gpu._gluon import LOG2_E, barrier, cache_descriptor, gdc_launch_dependents, gdc_wait
from charonia_kernels.gpu._launch import DeviceTraits

if TYPE_CHECKING:
    from charonia_kernels.gpu.attention_prefill import PrefillConfig

GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def supported(
    head_dim: int, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, device: DeviceTraits
) -> bool:
    """Whether these shapes can be run here."""
    return device.capability == (9, 0) and dtype in GL_DTYPES and cache_dtype == dtype and head_dim <= 128


@gluon.jit
def _copy_tiles(  # type: ignore[no-untyped-def]
    key_desc,  # over [num_blocks * num_kv_heads * BLOCK_SIZE, HEAD_DIM]
    value_desc,
    keys,  # ring of [STAGES, BLOCK_N, HEAD_PAD]
    values,
    key_full,  # barriers [STAGES, 1]
    key_free,
    value_full,
    value_free,
    table_ptr,  # at the sequence's row
    head,
    num_kv_heads,
    start,  # first key, a multiple of BLOCK_N
    stop,
    BLOCK_SIZE: gl.constexpr,
):
    """The copying warp. A slot of a ring is free when both warpgroups have said so."""
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    BOX: gl.constexpr = key_desc.block_type.shape[0]
    for index in range(gl.cdiv(stop - start, BLOCK_N)):
        slot = index % STAGES
        phase = (index // STAGES) & 1
        tile = start + index * BLOCK_N
        mbarrier.wait(key_free.index(slot), phase ^ 1)
        mbarrier.expect(key_full.index(slot), BLOCK_N * keys.shape[2] * 2)
        for piece in gl.static_range(BLOCK_N // BOX):
            first = tile + piece * BOX
            # Past the end the null block stands in: its weights will be zero.
            block = gl.load(table_ptr + first // BLOCK_SIZE, mask=first < stop, other=0)
            row = (block * num_kv_heads + head) * BLOCK_SIZE + first % BLOCK_SIZE
            tma.async_copy_global_to_shared(
                key_desc, [row, 0], key_full.index(slot), keys.index(slot).slice(piece * BOX, BOX)
            )
        mbarrier.wait(value_free.index(slot), phase ^ 1)
        mbarrier.expect(value_full.index(slot), BLOCK_N * keys.shape[2] * 2)
        for piece in gl.static_range(BLOCK_N // BOX):
            first = tile + piece * BOX
            block = gl.load(table_ptr + first // BLOCK_SIZE, mask=first < stop, other=0)
            row = (block * num_kv_heads + head) * BLOCK_SIZE + first % BLOCK_SIZE
            tma.async_copy_global_to_shared(
                value_desc, [row, 0], value_full.index(slot), values.index(slot).slice(piece * BOX, BOX)
            )


@gluon.jit
def _softmax_step(  # type: ignore[no-untyped-def]
    scores,  # [HALF, BLOCK_N] fp32, products of queries and keys
    maximum,  # [HALF] fp32, in base-2 units
    total,  # [HALF] fp32
    scale,
    position,  # [HALF] int32
    key,  # [BLOCK_N] int32
    MASKED: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr,
):
    """As the portable kernel's."""
    if SOFT_CAP > 0:
        doubled = gl.exp2(scores * (scale * (2.0 * LOG2_E / SOFT_CAP)))
        scores = (SOFT_CAP * LOG2_E) * (1.0 - 2.0 / (1.0 + doubled))
        scale = 1.0
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = gl.where(visible, scores, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=1) * scale)
    shift = new_maximum
    if WINDOW > 0:  # a row may have seen no key so far
        shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = gl.exp2(scores * scale - shift[:, None])
    shrink = gl.exp2(maximum - shift)
    return weights, shrink, new_maximum, total * shrink + gl.sum(weights, axis=1)


@gluon.jit
def _silence(values, tile, first_key, stop, silenced, phase, PART: gl.constexpr):  # type: ignore[no-untyped-def]
    """Zero the values of keys outside [first_key, stop), which may be NaN: weight zero would not silence them.

    Each warpgroup does its half of the tile and waits for the other.
    """
    HALF: gl.constexpr = values.shape[0] // 2
    WIDTH: gl.constexpr = values.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    half = values.slice(PART * HALF, HALF)
    key = tile + PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    exists = (key >= first_key) & (key < stop)
    half.store(gl.where(exists[:, None], half.load(layout), 0.0))
    fence_async_shared()
    barrier()
    mbarrier.arrive(silenced, count=1)
    mbarrier.wait(silenced, phase)


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    state,  # (acc, weights, maximum, total) after the tile before `begin`
    q,
    keys,
    values,
    key_full,
    key_free,
    value_full,
    value_free,
    turns,  # [2, 1]
    position,
    lane,  # [BLOCK_N] int32
    scale,
    start,
    begin,  # tiles [begin, end), counted from the one at key `start`
    end,
    MASKED: gl.constexpr,
    PART: gl.constexpr,
    PING_PONG: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr,
):
    """Score tiles [begin, end), each time weighing the values of the tile before."""
    HALF: gl.constexpr = q.shape[0]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    acc, weights, maximum, total = state
    acc_layout: gl.constexpr = acc.type.layout
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    for index in range(begin, end):
        slot = index % STAGES
        before = (index - 1) % STAGES
        mbarrier.wait(key_full.index(slot), (index // STAGES) & 1)
        mbarrier.wait(value_full.index(before), ((index - 1) // STAGES) & 1)
        if PING_PONG:
            mbarrier.wait(turns.index(PART), (index - PART) & 1)
        zeros = gl.zeros([HALF, BLOCK_N], gl.float32, score_layout)
        scores = warpgroup_mma(q, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(weights, values.index(before), acc, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turns.index(1 - PART), count=1)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(key_free.index(slot), count=1)
        fresh, shrink, maximum, total = _softmax_step(
            scores, maximum, total, scale, position, start + index * BLOCK_N + lane, MASKED, WINDOW, SOFT_CAP
        )
        rounded = fresh.to(q.dtype)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(value_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
        weights = gl.convert_layout(rounded, weights.type.layout)
    return acc, weights, maximum, total


@gluon.jit
def _warpgroup(  # type: ignore[no-untyped-def]
    q_ptr,
    out_ptr,
    queries,  # [HALF, HEAD_PAD] in shared memory, for the queries and then the result
    keys,
    values,
    key_full,
    key_free,
    value_full,
    value_free,
    turns,
    silenced,  # [1, 1], by both warpgroups
    scale,
    q_stride,
    out_stride,
    head,
    first,  # flat token
    count,
    start,
    begin,
    PART: gl.constexpr,
    PING_PONG: gl.constexpr,
    G: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr,
):
    """Half of the rows of a tile, from queries to the result."""
    HALF: gl.constexpr = queries.shape[0]
    WIDTH: gl.constexpr = queries.shape[1]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = queries.dtype
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)

    line = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, copy_layout))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, copy_layout))
    token = line // G
    live = (token < count) & (line < 2 * HALF // G * G)
    mask = live[:, None] & (column < HEAD_DIM)[None, :]
    within = (head * G + line % G)[:, None] * HEAD_DIM + column[None, :]
    flat = (first + token).to(gl.int64)[:, None]
    queries.store(gl.load(q_ptr + flat * q_stride + within, mask=mask, other=0.0))
    fence_async_shared()

    position = begin + (PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, score_layout))) // G
    lane = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))
    stop = begin + count
    tiles = gl.cdiv(stop - start, BLOCK_N)
    # Tiles [plain, diagonal) are seen by every query of the item.
    diagonal = (begin + 1 - start) // BLOCK_N
    first_key = gl.maximum(begin - WINDOW + 1, 0) if WINDOW > 0 else 0

    mbarrier.wait(key_full.index(0), 0)
    zeros = gl.zeros([HALF, BLOCK_N], gl.float32, score_layout)
    scores = warpgroup_mma(queries, keys.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(key_free.index(0), count=1)
    maximum = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
    total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, score_layout))
    fresh, _, maximum, total = _softmax_step(
        scores, maximum, total, scale, position, start + lane, True, WINDOW, SOFT_CAP
    )
    weights = gl.convert_layout(fresh.to(dtype), weight_layout)
    acc = gl.zeros([HALF, WIDTH], gl.float32, acc_layout)
    state = (acc, weights, maximum, total)
    plain = 1
    if WINDOW > 0:
        if first_key > start:
            mbarrier.wait(value_full.index(0), 0)
            _silence(values.index(0), start, first_key, stop, silenced.index(0), 0, PART)
        plain = gl.minimum(gl.maximum(gl.cdiv(stop - WINDOW - start, BLOCK_N), 1), tiles)
        state = _attend(
            state, queries, keys, values, key_full, key_free, value_full, value_free, turns,
            position, lane, scale,
            start, 1, plain, True, PART, PING_PONG, WINDOW, SOFT_CAP,
        )  # fmt: skip
    diagonal = gl.maximum(diagonal, plain)
    state = _attend(
        state, queries, keys, values, key_full, key_free, value_full, value_free, turns,
            position, lane, scale,
        start, plain, diagonal, False, PART, PING_PONG, WINDOW, SOFT_CAP,
    )  # fmt: skip
    state = _attend(
        state, queries, keys, values, key_full, key_free, value_full, value_free, turns,
            position, lane, scale,
        start, diagonal, tiles, True, PART, PING_PONG, WINDOW, SOFT_CAP,
    )  # fmt: skip
    acc, weights, maximum, total = state

    last = (tiles - 1) % STAGES
    mbarrier.wait(value_full.index(last), ((tiles - 1) // STAGES) & 1)
    end = start + tiles * BLOCK_N
    if end > stop:
        phase = (first_key > start).to(gl.int32) if WINDOW > 0 else 0
        _silence(values.index(last), end - BLOCK_N, first_key, stop, silenced.index(0), phase, PART)
    acc = warpgroup_mma(weights, values.index(last), acc, is_async=True)
    factor = gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))
    acc = warpgroup_mma_wait(0, deps=[acc])
    queries.store((acc * factor[:, None]).to(dtype))
    gl.store(out_ptr + flat * out_stride + within, queries.load(copy_layout), mask=mask)


@gluon.jit(do_not_specialize=["table_stride"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    key_desc,
    value_desc,
    q_ptr,  # [T, num_heads, HEAD_DIM]
    table_ptr,  # [num_rows, max_blocks] int32
    items_ptr,  # [num_items, 4] int32
    out_ptr,  # [T, num_heads, HEAD_DIM]
    scale,
    q_stride,
    out_stride,
    table_stride,
    G: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr,  # 0: none
    SOFT_CAP: gl.constexpr,  # 0: none
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PING_PONG: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    """One work item and key/value head a program; grid (items, num_kv_heads)."""
    HEAD_PAD: gl.constexpr = key_desc.block_type.shape[1]
    dtype: gl.constexpr = key_desc.dtype
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, HEAD_PAD], key_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_PAD], key_desc.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_PAD], key_desc.layout)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    silenced = gl.allocate_shared_memory(gl.int64, [1, 1], barriers)
    mbarrier.init(silenced.index(0), count=2)
    turns = silenced  # of no use without PING_PONG
    if PING_PONG:
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
        for slot in gl.static_range(2):
            mbarrier.init(turns.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(key_full.index(slot), count=1)
        mbarrier.init(value_full.index(slot), count=1)
        mbarrier.init(key_free.index(slot), count=2)
        mbarrier.init(value_free.index(slot), count=2)
    fence_async_shared()
    gdc_wait(USE_PDL)
    gdc_launch_dependents(USE_PDL)
    item = items_ptr + gl.program_id(0) * 4
    count = gl.load(item + 2)
    if count == 0:
        return
    row, first, begin = gl.load(item), gl.load(item + 1), gl.load(item + 3)
    head, num_kv_heads = gl.program_id(1), gl.num_programs(1)
    table = table_ptr + row.to(gl.int64) * table_stride
    if SOFT_CAP == 0:
        scale = scale * LOG2_E
    start = 0
    if WINDOW > 0:
        start = gl.maximum(begin - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    gl.warp_specialize(
        [
            (
                _warpgroup,
                (
                    q_ptr, out_ptr, queries.index(0), keys, values, key_full, key_free, value_full, value_free,
                    turns, silenced, scale, q_stride, out_stride, head, first, count, start, begin,
                    0, PING_PONG, G, HEAD_DIM, WINDOW, SOFT_CAP,
                ),
            ),
            (
                _warpgroup,
                (
                    q_ptr, out_ptr, queries.index(1), keys, values, key_full, key_free, value_full, value_free,
                    turns, silenced, scale, q_stride, out_stride, head, first, count, start, begin,
                    1, PING_PONG, G, HEAD_DIM, WINDOW, SOFT_CAP,
                ),
            ),
            (
                _copy_tiles,
                (
                    key_desc, value_desc, keys, values, key_full, key_free, value_full, value_free,
                    table, head, num_kv_heads, start, begin + count, BLOCK_SIZE,
                ),
            ),
        ],
        [4, 1],
        [240, 32],
    )  # fmt: skip


def launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prefill_items: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    config: "PrefillConfig",
    device: DeviceTraits,
) -> None:
    """Run `prefill_kernel`; arguments as `prefill_attention`'s, with zeros for no window and no cap."""
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    shape = (num_blocks * num_kv_heads * block_size, head_dim, min(block_size, config.block_n), q.dtype)
    prefill_kernel[(prefill_items.shape[0], num_kv_heads)](
        cache_descriptor(key_cache.data_ptr(), *shape),
        cache_descriptor(value_cache.data_ptr(), *shape),
        q,
        block_table,
        prefill_items,
        out,
        scale,
        q.stride(0),
        out.stride(0),
        block_table.stride(0),
        G=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        PING_PONG=config.ping_pong,
        USE_PDL=device.has_pdl,
        num_warps=4,
        launch_pdl=device.has_pdl,
    )
