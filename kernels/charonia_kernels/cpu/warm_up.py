"""Compile, or load from the cache, every kernel that serving can reach, so that no request waits for it."""

import torch

from charonia_kernels.cpu._jit import pool
from charonia_kernels.cpu.activation import KERNEL as ACTIVATION
from charonia_kernels.cpu.linear import KERNEL as LINEAR
from charonia_kernels.cpu.norm import KERNEL as NORM
from charonia_kernels.cpu.paged_attention import COMBINE
from charonia_kernels.cpu.paged_attention import KERNEL as ATTENTION
from charonia_kernels.cpu.rope import KERNEL as ROPE


def warm_up(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
    """Prepare the kernels for a model.

    Args:
        dtype: of activations and weights; norm weights may be fp32 as well. Nothing is done for dtypes that the CPU
            kernels do not cover.
        kv_dtype: of the KV cache; ``dtype`` when None.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return
    pool()
    cache = dtype if kv_dtype is None else kv_dtype
    for weight in {dtype, torch.float32}:
        NORM.prepare(dtype, dtype, weight, False)
        NORM.prepare(dtype, dtype, weight, True)
    ACTIVATION.prepare(dtype, False)
    ACTIVATION.prepare(dtype, True)
    LINEAR.prepare(dtype, dtype)
    ROPE.prepare(dtype, cache)
    ATTENTION.prepare(dtype, cache)
    COMBINE.prepare(dtype)
