"""Linear layers of up to 128 rows on Hopper: a copying warp streams the weight, a warpgroup multiplies.

    copying warp     W W W W W W W W | wait for the kernel before | x x x x  W x  W x  W x ...
    scaling warps    norm weight     |                              r*g  r*g  r*g ...
    multiplying warps                |                                 W.x  W.x  W.x ...  sums, outputs

The weight comes by bulk copies (TMA) into a ring in shared memory; the first ring-full is under way before the kernel
in front has ended, since no kernel writes weights. A program takes so little shared memory that those of the next
kernel start beside it. With a fused norm the scaling warps turn the residual r into r * g in place and sum up its
squares.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from charonia_kernels.gpu._gluon import gdc_launch_dependents, matrix_descriptor
from charonia_kernels.gpu.linear_config import HOPPER_SM_BYTES, LinearConfig, tile_rows
from charonia_kernels.gpu.linear_hopper_warps import compute, copy, scale

COPY_REGISTERS = 24
SCALE_REGISTERS = 96


@gluon.constexpr_function
def _power_of_two(value):  # type: ignore[no-untyped-def]
    return 1 << (value - 1).bit_length()


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
    # Registers of a thread; the multiplying warps have what is left.
    COPY_REGISTERS: gl.constexpr,
    SCALE_REGISTERS: gl.constexpr,
):
    """One program: all rows of x against BLOCK_N rows of the weight and one of SPLIT_K parts of their columns.

    Of the programs of a tile the last to arrive adds up the parts. What lies out of bounds is copied as zeros, in the
    columns too.
    """
    gdc_launch_dependents(USE_PDL)
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    gl.static_assert(W_STAGES * BLOCK_K >= 2 * BLOCK_M, "the ring of the weight has no room for the sums")
    gl.static_assert(X_STAGES <= W_STAGES, "more tiles of x than of the weight")
    STEPS: gl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    dtype: gl.constexpr = x_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    w_ring = gl.allocate_shared_memory(dtype, [W_STAGES, BLOCK_N, BLOCK_K], layout)
    x_ring = gl.allocate_shared_memory(dtype, [X_STAGES, BLOCK_M, BLOCK_K], layout)
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], barriers)
    done = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], barriers)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], barriers)
    warm = x_full  # of no use without PDL
    if USE_PDL:
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
                    compute,
                    (
                        w_ring, x_ring, w_full, x_ready, done, squares, squares_ready,
                        bias_ptr, residual_ptr, out_ptr, partials_ptr, arrivals_ptr, M, N, first, out_stride, eps,
                        K, STEPS, SPLIT_K, X_MAJOR, NORM, GATED, BIAS, ADD, USE_PDL,
                    ),
                ),
                (
                    scale,
                    (
                        x_ring, x_full, x_ready, gains, squares, squares_ready, norm_weight_ptr, column, K, STEPS,
                    ),
                ),
                (
                    copy,
                    (
                        w_desc, x_desc, w_ring, x_ring, w_full, x_full, done, warm, first, N, column,
                        STEPS, GATED, USE_PDL,
                    ),
                ),
            ],
            [4, 1],
            [SCALE_REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
    else:
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    compute,
                    (
                        w_ring, x_ring, w_full, x_full, done, None, None,
                        bias_ptr, residual_ptr, out_ptr, partials_ptr, arrivals_ptr, M, N, first, out_stride, eps,
                        K, STEPS, SPLIT_K, X_MAJOR, NORM, GATED, BIAS, ADD, USE_PDL,
                    ),
                ),
                (
                    copy,
                    (
                        w_desc, x_desc, w_ring, x_ring, w_full, x_full, done, warm, first, N, column,
                        STEPS, GATED, USE_PDL,
                    ),
                ),
            ],
            [1],
            [COPY_REGISTERS],
        )  # fmt: skip


def supported(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x ``[M, K]`` and a contiguous weight ``[N, K]`` lie so that they can be copied in bulk."""
    return (
        (x.data_ptr() | weight.data_ptr()) % 16 == 0
        and (x.stride(0) | x.shape[1]) * x.element_size() % 16 == 0
        and x.element_size() == 2
    )


def launch_registers(config: LinearConfig, m: int, norm: bool) -> int:
    """Registers of each thread at launch: as many as leave room for the programs that shared memory has room for.

    The warpgroups of a program share what they have at launch: a copying thread keeps 24, a scaling thread
    SCALE_REGISTERS, and a multiplying thread needs its sums and 48 more.
    """
    own = config.num_warps // 4
    groups = own + 1 + norm
    block_m = tile_rows(config, m)
    sums = config.block_n * block_m // (128 * own)
    one_product = (config.block_n if config.x_major else block_m) // 2 + 32
    shared = config.num_stages * config.block_n + config.x_stages * block_m
    programs = HOPPER_SM_BYTES // (2 * config.block_k * shared + 4096)
    while True:
        registers = min(128, 65536 // (128 * groups * max(programs, 1))) // 8 * 8
        share = (registers * groups - COPY_REGISTERS - norm * SCALE_REGISTERS) // own
        if programs <= 1 or (registers >= one_product and share >= sums + 48):
            return registers
        programs -= 1


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
        matrix_descriptor(x.data_ptr(), m, k, x.stride(0), tile_rows(config, m), block_k, x.dtype),
        matrix_descriptor(weight.data_ptr(), n, k, k, block_n // 2 if gated else block_n, block_k, x.dtype),
        norm_weight, bias, residual, out, partials, arrivals, m, n, out.stride(0), eps,
        k, block_n, config.num_stages, config.x_stages, split_k, config.x_major,
        norm, gated, bias is not None, residual is not None, use_pdl, COPY_REGISTERS, SCALE_REGISTERS,
        num_warps=config.num_warps, maxnreg=launch_registers(config, m, norm), launch_pdl=use_pdl,
    )  # fmt: skip
