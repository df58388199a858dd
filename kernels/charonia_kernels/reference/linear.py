"""Dense projection, alone and with what stands before and after it in a transformer."""

import torch
import torch.nn.functional as F

from charonia_kernels.reference._dtype import compute_dtype
from charonia_kernels.reference.activation import silu_mul
from charonia_kernels.reference.norm import rms_norm


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``.

    Off the CPU the device's own matmul runs in the input's dtype (it accumulates in fp32); on the CPU the product is
    computed in fp32 and rounded once.

    Args:
        x: ``[T, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[T, N]`` in x's dtype.
    """
    if x.device.type != "cpu" and weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    wide_bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), wide_bias).to(x.dtype)


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear(rms_norm(residual), weight, bias)``, rounded once.

    Args:
        residual: ``[T, K]``.
        norm_weight: ``[K]``, of any floating-point dtype.
        eps: added to the mean square.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[T, N]`` in residual's dtype.
    """
    return _wide_norm_linear(residual, norm_weight, eps, weight, bias).to(residual.dtype)


def norm_linear_silu_mul(
    residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """``silu_mul(linear(rms_norm(residual), weight))``, rounded once.

    Args:
        residual: ``[T, K]``.
        norm_weight: ``[K]``, of any floating-point dtype.
        eps: added to the mean square.
        weight: ``[2 * I, K]``, the rows of the gate first.

    Returns:
        ``[T, I]`` in residual's dtype.
    """
    return silu_mul(_wide_norm_linear(residual, norm_weight, eps, weight, None)).to(residual.dtype)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``residual += x @ weight.T + bias`` in place, rounded once.

    Args:
        x: ``[T, K]``.
        weight: ``[N, K]``.
        residual: ``[T, N]``, updated in place.
        bias: ``[N]`` or None.
    """
    dtype = compute_dtype(x)
    wide_bias = None if bias is None else bias.to(dtype)
    residual.copy_(residual.to(dtype) + F.linear(x.to(dtype), weight.to(dtype), wide_bias))


def _wide_norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    dtype = compute_dtype(residual)
    wide_bias = None if bias is None else bias.to(dtype)
    return F.linear(rms_norm(residual.to(dtype), norm_weight, eps), weight.to(dtype), wide_bias)
