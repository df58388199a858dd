"""Gated activations on the GPU: ``act(gate) * up`` over the halves of one fused projection."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits


@dataclass(frozen=True, slots=True)
class ActivationConfig:
    """block: outputs of a program, all of one row."""

    block: int
    num_warps: int
    use_pdl: bool


def activation_config(rows: int, width: int, device: DeviceTraits) -> ActivationConfig:
    """Launch parameters for ``[rows, width]`` outputs: small programs while large ones would leave SMs idle."""
    many = rows * width >= 4 * 2048 * device.num_sms
    block = min(2048 if many else 512, max(triton.next_power_of_2(width), 32))
    return ActivationConfig(block, 4 if many else 2, device.has_pdl)


@triton.jit
def gated_kernel(  # type: ignore[no-untyped-def]
    # pointers
    x,
    out,
    # scalars
    x_stride,
    # constants
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of BLOCK outputs of a row; TILES tiles make a row. out [T, WIDTH] contiguous."""
    gdc_launch_dependents(USE_PDL)
    program = tl.program_id(0)
    row = (program // TILES).to(tl.int64)
    columns = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_place = x + row * x_stride + columns
    gdc_wait(USE_PDL)
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    argument = gate
    if GELU:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) * (gate + 0.044715 * gate**3)
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    result = (gate * tl.sigmoid(argument) * up).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + columns, result, mask=inside)


def _launch(
    op: str, x: torch.Tensor, gelu: bool, out: torch.Tensor | None, config: ActivationConfig | None
) -> torch.Tensor:
    rows, double = x.shape
    if double % 2 != 0 or x.stride(1) != 1:
        raise ValueError(
            f"{op}: x {list(x.shape)}, strides {x.stride()}, must be [T, 2 * I] without gaps in rows"
        )
    width = double // 2
    if out is None:
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    elif out.shape != (rows, width) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"{op}: out {list(out.shape)} {out.dtype} must be contiguous [T, I] in x's dtype")
    if rows == 0 or width == 0:
        return out
    if config is None:
        config = activation_config(rows, width, traits(x.device))
    tiles = triton.cdiv(width, config.block)
    gated_kernel[(rows * tiles,)](
        x,
        out,
        x.stride(0),
        WIDTH=width,
        TILES=tiles,
        BLOCK=config.block,
        GELU=gelu,
        USE_PDL=config.use_pdl,
        num_warps=config.num_warps,
        launch_pdl=config.use_pdl,
    )
    return out


def silu_mul(
    x: torch.Tensor, out: torch.Tensor | None = None, *, config: ActivationConfig | None = None
) -> torch.Tensor:
    """``silu(gate) * up``; see :func:`charonia_kernels.reference.silu_mul`.

    Args:
        x: ``[T, 2 * I]``, fp32, bf16 or fp16, gate first; rows may be strided.
        out: ``[T, I]`` in x's dtype, contiguous; made if None.
        config: launch parameters; by default :func:`activation_config`'s.

    Returns:
        ``[T, I]`` in x's dtype, contiguous. A row depends on that row of x alone, to the bit.

    Raises:
        ValueError: x has an odd width, or gaps in the last dimension; out does not fit.
    """
    return _launch("silu_mul", x, False, out, config)


def gelu_tanh_mul(
    x: torch.Tensor, out: torch.Tensor | None = None, *, config: ActivationConfig | None = None
) -> torch.Tensor:
    """``gelu(gate) * up``, tanh form; see :func:`charonia_kernels.reference.gelu_tanh_mul`.

    Args:
        x: ``[T, 2 * I]``, fp32, bf16 or fp16, gate first; rows may be strided.
        out: ``[T, I]`` in x's dtype, contiguous; made if None.
        config: launch parameters; by default :func:`activation_config`'s.

    Returns:
        ``[T, I]`` in x's dtype, contiguous. A row depends on that row of x alone, to the bit.

    Raises:
        ValueError: x has an odd width, or gaps in the last dimension; out does not fit.
    """
    return _launch("gelu_tanh_mul", x, True, out, config)
