"""Linear layers of up to 128 rows on Hopper: a copying warp streams the weight, a warpgroup multiplies.

    copying warp     W W W W W W W W | wait for the kernel before | x x x x  W x  W x  W x ...
    scaling warps    norm weight     |                              r*g  r*g  r*g ...
    multiplying warps                |                                 W.x  W.x  W.x ...  sums, outputs

The weight comes by bulk copies (TMA) into a ring in shared memory; the first ring-full is under way before the kernel in
front has ended, since no kernel writes weights. A program takes so little shared memory that those of the next kernel
start beside it. With a fused norm the scaling warps turn the residual r into r * g in place and sum up its squares.
"""

from functools import lru_cache

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from charonia_kernels.gpu.linear_config import HOPPER_SM_BYTES, LinearConfig, tile_rows

_NOWHERE = gl.constexpr(1 << 20)  # a row that no x has
SCALE_REGISTERS = 96


@gluon.constexpr_function
def _power_of_two(value):  # type: ignore[no-untyped-def]
    return 1 << (value - 1).bit_length()


@gluon.jit
def _gdc_wait(USE_PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    if USE_PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


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
def _copy(  # type: ignore[no-untyped-def]
    w_desc,
    x_desc,
    w_ring,  # [W_STAGES, BLOCK_N, BLOCK_K]
    x_ring,  # [X_STAGES, BLOCK_M, BLOCK_K]
    w_full,  # barriers [STAGES, 1] of each ring
    x_full,
    done,  # [W_STAGES, 1], a step has been multiplied
    warm,  # [1, 1]
    first,
    N,
    column,
    STEPS: gl.constexpr,
    GATED: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    """The copying warp. X_STAGES <= W_STAGES, so that a finished step makes room for x before it does for the weight."""
    W_STAGES: gl.constexpr = w_ring.shape[0]
    X_STAGES: gl.constexpr = x_ring.shape[0]
    for step in range(STEPS if STEPS < W_STAGES else W_STAGES):
        _copy_weight(w_desc, w_ring, w_full, step, first, N, column, GATED)
    if USE_PDL:  # Rows out of bounds read nothing of x, but bring its descriptor here.
        mbarrier.expect(warm.index(0), x_ring.shape[1] * x_ring.shape[2] * 2)
        tma.async_copy_global_to_shared(x_desc, [_NOWHERE, 0], warm.index(0), x_ring.index(0))
        mbarrier.wait(warm.index(0), 0)
    _gdc_wait(USE_PDL)
    for step in range(STEPS if STEPS < X_STAGES else X_STAGES):
        _copy_x(x_desc, x_ring, x_full, step, column)
    for step in range(STEPS - X_STAGES):
        mbarrier.wait(done.index(step % W_STAGES), (step // W_STAGES) & 1)
        _copy_x(x_desc, x_ring, x_full, step + X_STAGES, column)
        if step + W_STAGES < STEPS:
            _copy_weight(w_desc, w_ring, w_full, step + W_STAGES, first, N, column, GATED)


@gluon.jit
def _scale(  # type: ignore[no-untyped-def]
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
    gl.thread_barrier()
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
def _compute(  # type: ignore[no-untyped-def]
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
    _gdc_wait(USE_PDL)
    residual = inside
    if ADD:
        residual = gl.load(residual_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")

    acc = _multiply(w_ring, x_ring, w_full, x_ready, done, STEPS, X_MAJOR)
    # The ring has been read to the end by all warps; the sums take its place.
    gl.thread_barrier()
    sums = w_ring._reinterpret(gl.float32, [BLOCK_M, BLOCK_N], swizzled)
    if X_MAJOR:
        sums.store(acc)
    else:
        sums.permute((1, 0)).store(acc)
    gl.thread_barrier()
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
        gl.thread_barrier()
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
            _finish(y, up, total, bias, residual, out_ptr + offsets, inside, eps, K, NORM, GATED, BIAS, ADD)


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(  # type: ignore[no-untyped-def]
    # Descriptors: x [M, K] in boxes [BLOCK_M, BLOCK_K]; weight [N, K] in boxes [BLOCK_N, BLOCK_K] (GATED: half of it).
    x_desc,
    w_desc,
    # Tensors: norm_weight [K], bias [N], residual and out [M, N] (GATED: [M, N // 2]).
    norm_weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    # SPLIT_K > 1: a slot of fp32 sums for each program; int32 zeros, one for each tile, which end as zeros.
    partials_ptr,
    arrivals_ptr,
    # Scalars.
    M,
    N,
    out_stride,
    eps,
    # Tile.
    K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    W_STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    X_MAJOR: gl.constexpr,  # x is the tall operand of the tensor cores, the weight the wide one
    # What is fused.
    NORM: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    ADD: gl.constexpr,
    USE_PDL: gl.constexpr,
    # Registers of a scaling thread; a copying thread has 24, the others what is left.
    SCALE_REGISTERS: gl.constexpr,
):
    """One program: all rows of x against BLOCK_N rows of the weight and one of SPLIT_K parts of their columns.

    Of the programs of a tile the last to arrive adds up the parts. What lies out of bounds is copied as zeros, in the
    columns too.
    """
    if USE_PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1
        )
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    STEPS: gl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    dtype: gl.constexpr = x_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    w_ring = gl.allocate_shared_memory(dtype, [W_STAGES, BLOCK_N, BLOCK_K], layout)
    x_ring = gl.allocate_shared_memory(dtype, [X_STAGES, BLOCK_M, BLOCK_K], layout)
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], barriers)
    done = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], barriers)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], barriers)
    warm = gl.allocate_shared_memory(gl.int64, [1, 1], barriers)
    mbarrier.init(warm.index(0), count=1)
    for slot in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(slot), count=1)
        mbarrier.init(done.index(slot), count=1)
    for slot in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(slot), count=1)
    first = gl.program_id(0) // SPLIT_K * (BLOCK_N // 2 if GATED else BLOCK_N)
    column = gl.program_id(0) % SPLIT_K * (STEPS * BLOCK_K)
    if NORM:
        STEPS_PADDED: gl.constexpr = _power_of_two(STEPS)
        flat: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
        gains = gl.allocate_shared_memory(norm_weight_ptr.dtype.element_ty, [STEPS_PADDED, BLOCK_K], flat)
        squares = gl.allocate_shared_memory(gl.float32, [BLOCK_M], flat)
        squares_ready = gl.allocate_shared_memory(gl.int64, [1, 1], barriers)
        x_ready = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], barriers)
        mbarrier.init(squares_ready.index(0), count=1)
        for slot in gl.static_range(X_STAGES):
            mbarrier.init(x_ready.index(slot), count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        w_ring, x_ring, w_full, x_ready, done, squares, squares_ready,
                        bias_ptr, residual_ptr, out_ptr, partials_ptr, arrivals_ptr, M, N, first, out_stride, eps,
                        K, STEPS, SPLIT_K, X_MAJOR, NORM, GATED, BIAS, ADD, USE_PDL,
                    ),
                ),
                (
                    _scale,
                    (
                        x_ring, x_full, x_ready, gains, squares, squares_ready, norm_weight_ptr, column, K, STEPS,
                    ),
                ),
                (
                    _copy,
                    (
                        w_desc, x_desc, w_ring, x_ring, w_full, x_full, done, warm, first, N, column,
                        STEPS, GATED, USE_PDL,
                    ),
                ),
            ],
            [4, 1],
            [SCALE_REGISTERS, 24],
        )  # fmt: skip
    else:
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        w_ring, x_ring, w_full, x_full, done, None, None,
                        bias_ptr, residual_ptr, out_ptr, partials_ptr, arrivals_ptr, M, N, first, out_stride, eps,
                        K, STEPS, SPLIT_K, X_MAJOR, NORM, GATED, BIAS, ADD, USE_PDL,
                    ),
                ),
                (
                    _copy,
                    (
                        w_desc, x_desc, w_ring, x_ring, w_full, x_full, done, warm, first, N, column,
                        STEPS, GATED, USE_PDL,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip


class _Address:
    """Stands in for a tensor in a descriptor that must not keep the tensor alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def _descriptor(
    address: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int, dtype: torch.dtype
) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(
        _Address(address, dtype), [rows, columns], [stride, 1], [box_rows, box_columns], layout
    )


def supported(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x ``[M, K]`` and a contiguous weight ``[N, K]`` lie so that they can be copied in bulk."""
    return (
        (x.data_ptr() | weight.data_ptr()) % 16 == 0
        and (x.stride(0) | x.shape[1]) * x.element_size() % 16 == 0
        and x.element_size() == 2
    )


def launch_registers(config: LinearConfig, m: int, norm: bool) -> int:
    """Registers of each thread at launch: as many as leave room for the programs that shared memory has room for."""
    warps = config.num_warps + 4 + 4 * norm
    block_m = tile_rows(config, m)
    least = (config.block_n if config.x_major else block_m) // 2 + 32  # what one wgmma takes
    shared = config.num_stages * config.block_n + config.x_stages * block_m
    programs = max(1, HOPPER_SM_BYTES // (2 * config.block_k * shared + 2048))
    return max(least, min(128, 65536 // (32 * warps * programs))) // 8 * 8


def launch(
    config: LinearConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    partials: torch.Tensor | None,
    arrivals: torch.Tensor | None,
    eps: float,
    gated: bool,
    use_pdl: bool,
) -> None:
    """Run `hopper_kernel` on what `supported` accepts; residual is out, or None if nothing is added to it."""
    (m, k), n = x.shape, weight.shape[0]
    block_n, block_k, split_k = config.block_n, config.block_k, config.split_k
    norm = norm_weight is not None
    hopper_kernel[(-(-n // block_n) * split_k,)](
        _descriptor(x.data_ptr(), m, k, x.stride(0), tile_rows(config, m), block_k, x.dtype),
        _descriptor(weight.data_ptr(), n, k, k, block_n // 2 if gated else block_n, block_k, x.dtype),
        norm_weight, bias, residual, out, partials, arrivals, m, n, out.stride(0), eps,
        k, block_n, config.num_stages, config.x_stages, split_k, config.x_major,
        norm, gated, bias is not None, residual is not None, use_pdl, SCALE_REGISTERS,
        num_warps=config.num_warps, maxnreg=launch_registers(config, m, norm), launch_pdl=use_pdl,
    )  # fmt: skip
