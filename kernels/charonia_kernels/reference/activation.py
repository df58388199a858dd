"""Gated activations: ``act(gate) * up`` over the halves of one fused projection."""

import torch
import torch.nn.functional as F

from charonia_kernels.reference._dtype import compute_dtype


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        x: ``[T, 2 * I]``, the gate in the first half of the last dimension, up in the second.

    Returns:
        ``[T, I]`` in x's dtype.
    """
    gate, up = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up`` with the tanh approximation of GELU.

    Args:
        x: ``[T, 2 * I]``, the gate in the first half of the last dimension, up in the second.

    Returns:
        ``[T, I]`` in x's dtype.
    """
    gate, up = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)
