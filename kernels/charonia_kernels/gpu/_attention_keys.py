"""Attention of a tile of query rows to a range of keys in the paged cache, for the decode and shared-prefix kernels.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import triton
import triton.language as tl


@triton.jit
def for_cache(query, cache):  # type: ignore[no-untyped-def]
    """The queries in the dtype of the products. fp8 becomes fp16 at once but bf16 only by way of it, four times as
    slowly; queries past fp16's range do not occur in models that work, and are made its largest number.
    """
    if cache.dtype.element_ty.primitive_bitwidth == 8 and query.dtype == tl.bfloat16:
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return query


@triton.jit
def attend_keys(  # type: ignore[no-untyped-def]
    q,  # [ROWS, HEAD_PAD]
    key_cache,  # at the head's part of block 0
    value_cache,
    table,  # at the sequence's row
    block_stride,  # int64, elements from block to block
    scale,  # of the products; with log2(e) unless SOFT_CAP
    begin,  # first key; a multiple of TILE where a block is not smaller than that
    end,  # past the last key
    lowest,  # keys below it are seen by no row; read with WINDOW
    position,  # [ROWS] int32 of each row's query token; read with CAUSAL or WINDOW
    maximum,  # [ROWS] fp32, in base 2
    total,  # [ROWS] fp32
    acc,  # [ROWS, HEAD_PAD] fp32
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,  # rows may see less than all keys up to `end`
    WINDOW: tl.constexpr,  # 0: none
    SOFT_CAP: tl.constexpr,  # 0: none
    TILE: tl.constexpr,
):
    """Online softmax over keys [begin, end). Slots that no row sees are not read: they may hold NaN."""
    HEAD_PAD: tl.constexpr = q.shape[1]
    lane = tl.arange(0, TILE)
    column = tl.arange(0, HEAD_PAD)
    # Table entries are read one iteration before the copies that need them.
    if BLOCK_SIZE < TILE:
        entry = tl.load(table + (begin + lane) // BLOCK_SIZE, mask=begin + lane < end, other=0)
    else:
        entry = tl.load(table + begin // BLOCK_SIZE, mask=begin < end, other=0)
    for start in tl.range(begin, end, TILE):
        key = start + lane
        seen = key < end
        if WINDOW > 0:
            seen = seen & (key >= lowest)
        block = entry.to(tl.int64) * block_stride
        if BLOCK_SIZE < TILE:
            place = block + (key % BLOCK_SIZE) * HEAD_DIM
            entry = tl.load(table + (key + TILE) // BLOCK_SIZE, mask=key + TILE < end, other=0)
        else:
            place = block + (start % BLOCK_SIZE + lane) * HEAD_DIM
            entry = tl.load(table + (start + TILE) // BLOCK_SIZE, mask=start + TILE < end, other=0)
        offsets = place[:, None] + column[None, :]
        mask = seen[:, None]
        if HEAD_DIM < HEAD_PAD:
            mask = mask & (column < HEAD_DIM)[None, :]
        keys = tl.load(key_cache + offsets, mask=mask, other=0.0)
        values = tl.load(value_cache + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * scale
        if SOFT_CAP > 0:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities.
            doubled = tl.exp2(scores * (2.0 * 1.4426950408889634 / SOFT_CAP))
            scores = (SOFT_CAP * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + doubled))
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has a maximum of -inf.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc
