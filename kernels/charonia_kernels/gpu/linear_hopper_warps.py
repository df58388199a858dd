"""What the warps of `linear_hopper` do: copy, scale, multiply."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from charonia_kernels.gpu._gluon import barrier, gdc_wait

_NOWHERE = gl.constexpr(1 << 20)  # a row that no x has


@gluon.jit
def _copy_weight(w_desc, w_ring, w_full, step, first, N, column, GATED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Send for a tile of the weight. GATED: rows of the gate, then the same rows of the other half."""
    STAGES: gl.constexpr = w_ring.shape[0]
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_ring.shape[2]
    slot = step % STAGES
    barrier = w_full.index(slot)
    tile = w_ring.index(slot)
    at = column + step * BLOCK_K
    mbarrier.expect(barrier, w_ring.shape[1] * BLOCK_K * 2)
    if GATED:
        tma.async_copy_global_to_shared(w_desc, [first, at], barrier, tile.slice(0, ROWS))
        tma.async_copy_global_to_shared(w_desc, [N // 2 + first, at], barrier, tile.slice(ROWS, ROWS))
    else:
        tma.async_copy_global_to_shared(w_desc, [first, at], barrier, tile)


@gluon.jit
def _copy_x(x_desc, x_ring, x_full, step, column):  # type: ignore[no-untyped-def]
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    barrier = x_full.index(step % STAGES)
    mbarrier.expect(barrier, x_ring.shape[1] * BLOCK_K * 2)
    tma.async_copy_global_to_shared(
        x_desc, [0, column + step * BLOCK_K], barrier, x_ring.index(step % STAGES)
    )


@gluon.jit
def copy(  # type: ignore[no-untyped-def]
    w_desc,
    x_desc,
    w_ring,  # [W_STAGES, BLOCK_N, BLOCK_K]
    x_ring,  # [X_STAGES, BLOCK_M, BLOCK_K]
    w_full,  # barriers [STAGES, 1] of each ring
    x_full,
    done,  # [W_STAGES, 1], a step has been multiplied
    warm,  # [1, 1] if USE_PDL
    first,
    N,
    column,
    STEPS: gl.constexpr,
    GATED: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    """The copying warp. X_STAGES <= W_STAGES: a finished step makes room for a tile of each."""
    W_STAGES: gl.constexpr = w_ring.shape[0]
    X_STAGES: gl.constexpr = x_ring.shape[0]
    for step in range(STEPS if STEPS < W_STAGES else W_STAGES):
        _copy_weight(w_desc, w_ring, w_full, step, first, N, column, GATED)
    if USE_PDL:  # Rows out of bounds read nothing of x, but bring its descriptor here.
        mbarrier.expect(warm.index(0), x_ring.shape[1] * x_ring.shape[2] * 2)
        tma.async_copy_global_to_shared(x_desc, [_NOWHERE, 0], warm.index(0), x_ring.index(0))
        mbarrier.wait(warm.index(0), 0)
    gdc_wait(USE_PDL)
    for step in range(STEPS if STEPS < X_STAGES else X_STAGES):
        _copy_x(x_desc, x_ring, x_full, step, column)
    for step in range(STEPS - X_STAGES):
        mbarrier.wait(done.index(step % W_STAGES), (step // W_STAGES) & 1)
        _copy_x(x_desc, x_ring, x_full, step + X_STAGES, column)
        if step + W_STAGES < STEPS:
            _copy_weight(w_desc, w_ring, w_full, step + W_STAGES, first, N, column, GATED)


@gluon.jit
def scale(  # type: ignore[no-untyped-def]
    x_ring,
    x_full,
    x_ready,  # [X_STAGES, 1]
    gains,  # [at least STEPS, BLOCK_K]
    squares,  # [BLOCK_M] fp32
    squares_ready,  # [1, 1]
    norm_weight_ptr,
    column,
    K: gl.constexpr,
    STEPS: gl.constexpr,
):
    """The scaling warps: x * norm_weight in place, rounded to x's type; sums of squares of the rows."""
    X_STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    VEC: gl.constexpr = BLOCK_M * BLOCK_K // 128 if BLOCK_M * BLOCK_K < 1024 else 8
    layout: gl.constexpr = gl.BlockedLayout([1, VEC], [32 * VEC // BLOCK_K, BLOCK_K // VEC], [4, 1], [1, 0])
    lane: gl.constexpr = gl.SliceLayout(0, layout)
    flat: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])

    NUM_GAINS: gl.constexpr = gains.shape[0] * BLOCK_K
    k = column + gl.arange(0, NUM_GAINS, layout=flat)
    every = gains._reinterpret(gains.dtype, [NUM_GAINS], gains.layout)
    every.store(gl.load(norm_weight_ptr + k, mask=k < K, other=0.0))
    barrier()
    total = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, layout))
    for index in range(STEPS):
        slot = index % X_STAGES
        gain = gains.index(index).load(lane).to(gl.float32)
        mbarrier.wait(x_full.index(slot), (index // X_STAGES) & 1)
        x = x_ring.index(slot).load(layout).to(gl.float32)
        x_ring.index(slot).store((x * gain[None, :]).to(x_ring.dtype))
        fence_async_shared()
        mbarrier.arrive(x_ready.index(slot), count=1)
        total += gl.sum(x * x, axis=1)
    squares.store(total)
    mbarrier.arrive(squares_ready.index(0), count=1)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    w_ring,
    x_ring,
    w_full,
    x_ready,
    done,
    STEPS: gl.constexpr,
    X_MAJOR: gl.constexpr,
):
    """Sums of products, ``[BLOCK_M, BLOCK_N]`` if X_MAJOR, else ``[BLOCK_N, BLOCK_M]``."""
    W_STAGES: gl.constexpr = w_ring.shape[0]
    X_STAGES: gl.constexpr = x_ring.shape[0]
    ROWS: gl.constexpr = x_ring.shape[1] if X_MAJOR else w_ring.shape[1]
    COLUMNS: gl.constexpr = w_ring.shape[1] if X_MAJOR else x_ring.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    for step in range(STEPS):
        w_slot = step % W_STAGES
        x_slot = step % X_STAGES
        mbarrier.wait(w_full.index(w_slot), (step // W_STAGES) & 1)
        mbarrier.wait(x_ready.index(x_slot), (step // X_STAGES) & 1)
        if X_MAJOR:
            acc = warpgroup_mma(
                x_ring.index(x_slot), w_ring.index(w_slot).permute((1, 0)), acc, is_async=True
            )
        else:
            acc = warpgroup_mma(
                w_ring.index(w_slot), x_ring.index(x_slot).permute((1, 0)), acc, is_async=True
            )
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(done.index((step + W_STAGES - 1) % W_STAGES), count=1, pred=step > 0)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _add_parts(places, SLOT: gl.constexpr, SPLIT_K: gl.constexpr):  # type: ignore[no-untyped-def]
    """Add up what the programs of a tile have written, always in the same order."""
    total = gl.load(places, cache_modifier=".cg")
    for split in gl.static_range(1, SPLIT_K):
        total += gl.load(places + split * SLOT, cache_modifier=".cg")
    return total


@gluon.jit
def _finish(  # type: ignore[no-untyped-def]
    y,  # [BLOCK_M, OUT_N] fp32; of the gate, if GATED
    up,
    total,  # [BLOCK_M] fp32: squares of the rows
    bias,
    residual,
    places,
    inside,
    eps,
    K: gl.constexpr,
    NORM: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
):
    """Turn sums into outputs."""
    if NORM:
        factor = gl.rsqrt(total / K + eps)[:, None]
        y = y * factor
        if GATED:
            up = up * factor
    if BIAS:
        y += bias.to(gl.float32)[None, :]
    if GATED:
        y = y * up / (1.0 + gl.exp(-y))
    if ADD:
        y += residual.to(gl.float32)
    gl.store(places, y.to(places.dtype.element_ty), mask=inside)


@gluon.jit
def compute(  # type: ignore[no-untyped-def]
    w_ring,
    x_ring,
    w_full,
    x_ready,
    done,
    squares,
    squares_ready,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partials_ptr,
    arrivals_ptr,
    M,
    N,
    first,
    out_stride,
    eps,
    K: gl.constexpr,
    STEPS: gl.constexpr,
    SPLIT_K: gl.constexpr,
    X_MAJOR: gl.constexpr,
    NORM: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    """The multiplying warps: products, then outputs, which pass through shared memory to lie along rows."""
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    OUT_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WARPS: gl.constexpr = gl.num_warps()
    SHARE: gl.constexpr = BLOCK_M * OUT_N // (32 * WARPS)  # outputs of a thread
    VEC: gl.constexpr = 8 if SHARE >= 8 else SHARE
    ACROSS: gl.constexpr = OUT_N // VEC if OUT_N // VEC < 32 else 32
    layout: gl.constexpr = gl.BlockedLayout([1, VEC], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    whole: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4 if BLOCK_N >= 32 else 2, order=[1, 0])
    SLOT: gl.constexpr = (BLOCK_N + NORM) * BLOCK_M

    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, OUT_N, layout=gl.SliceLayout(0, layout))
    exists = first + n < (N // 2 if GATED else N)
    inside = (m < M)[:, None] & exists[None, :]
    offsets = m.to(gl.int64)[:, None] * out_stride + (first + n)[None, :]
    bias = n
    if BIAS:
        bias = gl.load(bias_ptr + first + n, mask=exists, other=0.0)
    gdc_wait(USE_PDL)
    residual = inside
    if ADD and SPLIT_K == 1:
        residual = gl.load(residual_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")

    acc = _multiply(w_ring, x_ring, w_full, x_ready, done, STEPS, X_MAJOR)
    # The ring has been read to the end by all warps; the sums take its place.
    barrier()
    sums = w_ring._reinterpret(gl.float32, [BLOCK_M, BLOCK_N], swizzled)
    if X_MAJOR:
        sums.store(acc)
    else:
        sums.permute((1, 0)).store(acc)
    barrier()
    total = m.to(gl.float32)
    if NORM:
        mbarrier.wait(squares_ready.index(0), 0)
        total = squares.load(gl.SliceLayout(1, layout))
    if SPLIT_K == 1:
        y = sums.slice(0, OUT_N, dim=1).load(layout)
        up = y
        if GATED:
            up = sums.slice(OUT_N, OUT_N, dim=1).load(layout)
        _finish(y, up, total, bias, residual, out_ptr + offsets, inside, eps, K, NORM, GATED, BIAS, ADD)
    else:
        slot = gl.program_id(0)
        tile = slot // SPLIT_K
        part = partials_ptr + slot.to(gl.int64) * SLOT
        line = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, whole))
        column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, whole))
        gl.store(part + line[:, None] * BLOCK_N + column[None, :], sums.load(whole))
        if NORM:
            gl.store(part + BLOCK_N * BLOCK_M + m, total)
        barrier()
        if gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            gl.store(arrivals_ptr + tile, 0)
            part = partials_ptr + (tile * SPLIT_K).to(gl.int64) * SLOT
            places = part + m[:, None] * BLOCK_N + n[None, :]
            y = _add_parts(places, SLOT, SPLIT_K)
            up = y
            if GATED:
                up = _add_parts(places + OUT_N, SLOT, SPLIT_K)
            if NORM:
                total = _add_parts(part + BLOCK_N * BLOCK_M + m, SLOT, SPLIT_K)
            late = inside
            if ADD:
                late = gl.load(residual_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(y, up, total, bias, late, out_ptr + offsets, inside, eps, K, NORM, GATED, BIAS, ADD)
