"""Compile, or load from the cache, every kernel that serving can reach, so that no request waits for it."""

import torch

from charonia_kernels.cpu import activation, linear, norm, paged_attention, rope


def warm_up(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
    """Prepare the kernels for a model.

    Args:
        dtype: of activations and weights; norm weights may be fp32 as well. Nothing is done for dtypes that the CPU
            kernels do not cover.
        kv_dtype: of the KV cache; ``dtype`` when None.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return
    cache = dtype if kv_dtype is None else kv_dtype
    for weight in {dtype, torch.float32}:
        norm.KERNEL.variant(dtype, dtype, weight, False)
        norm.KERNEL.variant(dtype, dtype, weight, True)
    activation.KERNEL.variant(dtype, False)
    activation.KERNEL.variant(dtype, True)
    linear.KERNEL.variant(dtype, dtype)
    rope.KERNEL.variant(dtype, cache)
    paged_attention.KERNEL.variant(dtype, cache)
    paged_attention.COMBINE.variant(dtype)
