"""The accumulation type of the oracles."""

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
