"""Pieces of `attention_decode_hopper`: bringing tiles in, the newest key, and adding up what several programs found."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from charonia_kernels.gpu._gluon import LOG2_E, barrier


@gluon.jit
def load_few(pointer, COUNT: gl.constexpr, STEP: gl.constexpr, DIVISOR: gl.constexpr, begin, end):  # type: ignore[no-untyped-def]
    """Int32 numbers at ``pointer + (begin + i * STEP) // DIVISOR`` for i < COUNT, all in every thread, by loads that
    do not wait for one another; 0 where begin + i * STEP is not below `end`. They come from the L2 cache.
    """
    layout: gl.constexpr = gl.BlockedLayout([COUNT], [32], [gl.num_warps()], [0])
    place = begin + gl.arange(0, COUNT, layout=layout) * STEP
    return gl.load(pointer + place // DIVISOR, mask=place < end, other=0, cache_modifier=".cg")


@gluon.jit
def pick(numbers, INDEX: gl.constexpr):  # type: ignore[no-untyped-def]
    """One of what `load_few` or a load of its layout brought. Costs nothing: it is a register of every thread."""
    index = gl.arange(0, numbers.shape[0], layout=numbers.type.layout)
    return gl.sum(gl.where(index == INDEX, numbers, 0), axis=0)


@gluon.jit
def fetch_box(  # type: ignore[no-untyped-def]
    desc,  # over [num_blocks * NUM_KV_HEADS * BLOCK_SIZE, HEAD_DIM]
    ring,  # [STAGES, TILE, HEAD_PAD]
    full,  # [STAGES, 1], completed by all boxes of a tile
    tile,  # counted from the item's first
    exists,  # whether the item has that tile
    first,  # first key of the box
    limit,
    block,
    head,
    PIECE: gl.constexpr,  # which box of the tile
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """Send for a box of a tile; one without a key below `limit` is only counted."""
    STAGES: gl.constexpr = ring.shape[0]
    BOX: gl.constexpr = desc.block_type.shape[0]
    slot = tile % STAGES
    bar = full.index(slot)
    inside = exists & (first < limit)
    row = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + first % BLOCK_SIZE
    mbarrier.expect(bar, BOX * ring.shape[2] * 2, pred=inside)
    tma.async_copy_global_to_shared(
        desc, [row, 0], bar, ring.index(slot).slice(PIECE * BOX, BOX), pred=inside
    )
    if PIECE > 0:
        mbarrier.arrive(bar, count=1, pred=exists & (first >= limit))


@gluon.jit
def fetch_tile(  # type: ignore[no-untyped-def]
    desc,
    ring,
    full,
    tile,  # one that exists
    begin,  # first key of the item
    limit,
    blocks,  # of the tile's boxes, from `load_few`
    head,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """Send for a tile."""
    TILE: gl.constexpr = ring.shape[1]
    BOX: gl.constexpr = desc.block_type.shape[0]
    for piece in gl.static_range(TILE // BOX):
        first = begin + tile * TILE + piece * BOX
        block = pick(blocks, piece)
        fetch_box(desc, ring, full, tile, True, first, limit, block, head, piece, NUM_KV_HEADS, BLOCK_SIZE)


@gluon.jit
def silence(values, first, limit):  # type: ignore[no-untyped-def]
    """Zero the values [TILE, HEAD_PAD] of keys from `limit` on, which may be NaN: weight zero would not silence them.

    first: key of the tile's first row. Every thread of the program must have seen the tile arrive.
    """
    WIDTH: gl.constexpr = values.shape[1]
    ROWS: gl.constexpr = 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [gl.num_warps(), 1], [1, 0])
    for piece in gl.static_range(values.shape[0] // ROWS):
        if first + (piece + 1) * ROWS > limit:
            part = values.slice(piece * ROWS, ROWS)
            key = first + piece * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            part.store(gl.where((key < limit)[:, None], part.load(layout), 0.0))
    fence_async_shared()
    barrier()


@gluon.jit
def cap(scores, scale, SOFT_CAP: gl.constexpr):  # type: ignore[no-untyped-def]
    """Products of queries and keys to scores in base-2 units. scale: with log2(e) unless SOFT_CAP."""
    scores = scores * scale
    if SOFT_CAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities.
        doubled = gl.exp2(scores * (2.0 * LOG2_E / SOFT_CAP))
        scores = (SOFT_CAP * LOG2_E) * (1.0 - 2.0 / (1.0 + doubled))
    return scores


@gluon.jit
def combine(  # type: ignore[no-untyped-def]
    partial_out,
    partial_stats,
    first_item,
    count,
    head,
    out,  # at the entry's first row, [G, HEAD_DIM]
    NUM_KV_HEADS: gl.constexpr,
    G: gl.constexpr,
    G_PAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_PAD: gl.constexpr,
    WIDTH: gl.constexpr,  # items of an iteration
):
    """Add up all items of an entry, in their order, and store the result. As the portable kernel's."""
    LANES: gl.constexpr = HEAD_PAD // 4 if HEAD_PAD < 128 else 32
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 4], [1, 32 // LANES, LANES], [1, gl.num_warps(), 1], [2, 1, 0]
    )
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    whole: gl.constexpr = gl.SliceLayout(0, layout)
    along: gl.constexpr = gl.SliceLayout(1, whole)
    step = gl.arange(0, WIDTH, layout=gl.SliceLayout(1, pairs))
    row = gl.arange(0, G_PAD, layout=gl.SliceLayout(0, pairs))
    column = gl.arange(0, HEAD_PAD, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    maximum = gl.full([G_PAD], float("-inf"), gl.float32, gl.SliceLayout(0, pairs))
    total = gl.zeros([G_PAD], gl.float32, gl.SliceLayout(0, pairs))
    acc = gl.zeros([G_PAD, HEAD_PAD], gl.float32, whole)
    for start in range(0, count, WIDTH):
        part = (first_item + start + step) * NUM_KV_HEADS + head
        exists = (start + step < count)[:, None] & (row < G)[None, :]
        # Past this multiprocessor's own cache: others have just written these.
        stats = partial_stats + part[:, None] * (2 * G) + row[None, :]
        part_maximum = gl.load(stats, mask=exists, other=float("-inf"), cache_modifier=".cg")
        part_total = gl.load(stats + G, mask=exists, other=0.0, cache_modifier=".cg")
        place = part.to(gl.int64)[:, None, None] * (G * HEAD_DIM) + row[None, :, None] * HEAD_DIM
        part_acc = gl.load(
            partial_out + place + column[None, None, :],
            mask=exists[:, :, None] & (column < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = gl.maximum(maximum, gl.max(part_maximum, axis=0))
        shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weight = gl.exp2(part_maximum - shift[None, :])
        shrink = gl.exp2(maximum - shift)
        total = total * shrink + gl.sum(part_total * weight, axis=0)
        acc = acc * gl.convert_layout(shrink, along)[:, None] + gl.sum(part_acc * weight[:, :, None], axis=0)
        maximum = new_maximum
    result = acc * gl.convert_layout(1.0 / gl.where(total > 0.0, total, 1.0), along)[:, None]
    r = gl.arange(0, G_PAD, layout=along)
    d = gl.arange(0, HEAD_PAD, layout=gl.SliceLayout(0, whole))
    gl.store(
        out + r[:, None] * HEAD_DIM + d[None, :],
        result.to(out.dtype.element_ty),
        mask=(r < G)[:, None] & (d < HEAD_DIM)[None, :],
    )
