"""Dense projection."""

import torch
import torch.nn.functional as F

from charonia_kernels.reference._dtype import compute_dtype


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
