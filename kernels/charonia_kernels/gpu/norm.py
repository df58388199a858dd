"""RMSNorm (Zhang and Sennrich, 2019) on the GPU, alone and behind a residual add: one program a row."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits

MAX_WIDTH = 16384


@dataclass(frozen=True, slots=True)
class NormConfig:
    """block: lanes of a program, a power of two that holds the row."""

    block: int
    num_warps: int
    use_pdl: bool


def norm_config(width: int, device: DeviceTraits) -> NormConfig:
    """Launch parameters, of the width alone: a row's result does not depend on how many rows there are.

    At 512 lanes a warp, a thread has two 16-byte loads of bf16 in flight.
    """
    block = triton.next_power_of_2(width)
    return NormConfig(block, min(max(block // 512, 4), 16), device.has_pdl)


@triton.jit
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    # pointers; residual may be None
    x,
    residual,
    weight,
    out,
    # scalars
    x_stride,
    residual_stride,
    eps,
    # constants
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One row: the optional residual add, then the norm. out [T, WIDTH] contiguous."""
    gdc_launch_dependents(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    gdc_wait(USE_PDL)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + row * residual_stride + columns
        total = (tl.load(place, mask=inside, other=0.0).to(tl.float32) + values).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        values = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    result = (values * inverse * gain).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + columns, result, mask=inside)


def _launch(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    config: NormConfig | None,
) -> torch.Tensor:
    rows, width = x.shape
    if weight.shape != x.shape[1:] or (residual is not None and residual.shape != x.shape):
        shapes = [list(t.shape) for t in (x, residual, weight) if t is not None]
        raise ValueError(f"{op}: the shapes of x, residual and weight do not fit: {shapes}")
    if x.stride(1) != 1 or weight.stride(0) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError(f"{op}: x, residual or weight has gaps in the last dimension")
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{op}: width {width} is not in 1..{MAX_WIDTH}")
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if config is None:
        config = norm_config(width, traits(x.device))
    rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        WIDTH=width,
        BLOCK=config.block,
        USE_PDL=config.use_pdl,
        num_warps=config.num_warps,
        launch_pdl=config.use_pdl,
    )
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, config: NormConfig | None = None
) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight``; see :func:`charonia_kernels.reference.rms_norm`.

    Args:
        x: ``[T, H]``, fp32, bf16 or fp16, ``H <= 16384``, rows may be strided.
        weight: ``[H]``, of any floating-point dtype.
        eps: added to the mean square.
        config: launch parameters; by default :func:`norm_config`'s.

    Returns:
        ``[T, H]`` in x's dtype, contiguous. A row depends on that row of x alone, to the bit.

    Raises:
        ValueError: shapes do not fit, or the last dimension has gaps.
    """
    return _launch("rms_norm", x, None, weight, eps, config)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    config: NormConfig | None = None,
) -> torch.Tensor:
    """``residual += x`` in place, then its norm; see :func:`charonia_kernels.reference.add_rms_norm`.

    Args:
        x: ``[T, H]``, fp32, bf16 or fp16, ``H <= 16384``, rows may be strided.
        residual: ``[T, H]``, fp32, bf16 or fp16, rows may be strided; updated in place.
        weight: ``[H]``, of any floating-point dtype.
        eps: added to the mean square.
        config: launch parameters; by default :func:`norm_config`'s.

    Returns:
        ``[T, H]`` in x's dtype, contiguous. A row depends on those rows of x and residual alone, to the bit.

    Raises:
        ValueError: shapes do not fit, or the last dimension has gaps.
    """
    return _launch("add_rms_norm", x, residual, weight, eps, config)
