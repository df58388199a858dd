"""RMSNorm (Zhang and Sennrich, 2019), alone and behind a residual add."""

import torch

from charonia_kernels.reference._dtype import compute_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension.

    Args:
        x: ``[T, H]``.
        weight: ``[H]``, of any floating-point dtype.
        eps: added to the mean square.

    Returns:
        ``[T, H]`` in x's dtype.
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(dtype)).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x`` in place, then ``rms_norm(residual)``.

    The sum is rounded to the residual's dtype before it is normalised, so that the next layer sees the same numbers.

    Args:
        x: ``[T, H]``.
        residual: ``[T, H]``, updated in place.
        weight: ``[H]``.
        eps: added to the mean square.

    Returns:
        ``[T, H]`` in x's dtype.
    """
    dtype = compute_dtype(residual)
    residual.copy_(residual.to(dtype) + x.to(dtype))
    return rms_norm(residual, weight, eps).to(x.dtype)
