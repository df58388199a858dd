"""How a linear layer is computed: a function of its shape and the device."""

from dataclasses import replace
from functools import cache

import torch

from charonia_kernels.gpu._launch import INTERPRETED, DeviceTraits
from charonia_kernels.gpu.linear_config import CUBLAS, LinearConfig, Op
from charonia_kernels.gpu.linear_table import MEASURED

_RESERVED_BYTES = 2048  # of shared memory: reductions, barriers, and what the driver keeps


@cache
def choose(
    m: int, n: int, k: int, dtype: torch.dtype, traits: DeviceTraits, op: Op, *, bulk: bool = True
) -> LinearConfig:
    """Configuration for `m` rows of x and a weight ``[n, k]``; `bulk`: both can be copied in bulk."""
    if dtype not in (torch.bfloat16, torch.float16) or k % 16 or k == 0:
        return CUBLAS
    measured = (config for most, config in MEASURED.get((n, k, op), ()) if m <= most)
    config = next(measured, None) or _default(m, n, k, traits, op)
    if config.kind == "hopper" and not (bulk and has_hopper_kernel(traits)):
        config = _default(m, n, k, traits, op)
    if config.kind == "hopper" and dtype == torch.float16:
        config = replace(config, fuse_norm=False)
    if config.kind == "skinny":
        if dtype == torch.float16:  # x * norm_weight is rounded before it is scaled, and might not fit
            config = replace(config, fuse_norm=False)
        while config.shared_bytes(m, dtype.itemsize) > traits.max_shared_bytes - _RESERVED_BYTES:
            if config.num_stages == 2:
                return CUBLAS
            config = replace(config, num_stages=config.num_stages - 1)
    return config


def has_hopper_kernel(traits: DeviceTraits) -> bool:
    """Whether configurations of kind "hopper" run there: not in the interpreter, nor on other architectures."""
    return traits.capability == (9, 0) and not INTERPRETED


def _default(m: int, n: int, k: int, traits: DeviceTraits, op: Op) -> LinearConfig:
    """Enough programs to fill the device, and about 100 KB of the weight under way for each."""
    if m <= 4:
        block_n = 4 if m > 2 or op == "norm_linear_silu_mul" else 2
        block_k = 2048 if block_n * m <= 4 and k >= 2048 else 1024
        return LinearConfig("vector", block_n, block_k, prefetch=4096)
    if m > 64:
        return CUBLAS
    wide = 128 if m > 32 else 64
    block_n = next((b for b in (wide, 64, 32) if n >= b * traits.num_sms), 32 if m > 16 else 16)
    split_k = 1
    while -(-n // block_n) * split_k * 3 < traits.num_sms * 2 and k // (2 * split_k) >= 1024:
        split_k *= 2
    block_k = 128 if block_n >= 64 else 256
    num_stages = min(6, max(3, 100 * 1024 // (2 * block_k * (block_n + max(16, m)))))
    return LinearConfig("skinny", block_n, block_k, split_k, 4, num_stages, prefetch=2048, block_m=16)
