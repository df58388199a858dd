"""How a linear layer is computed: a function of its shape and the device."""

from dataclasses import replace
from functools import cache

import torch

from charonia_kernels.gpu._launch import INTERPRETED, DeviceTraits
from charonia_kernels.gpu.linear_config import CUBLAS, LinearConfig, Op, hopper_config
from charonia_kernels.gpu.linear_table import MEASURED

_RESERVED_BYTES = 2048  # of shared memory: reductions, barriers, and what the driver keeps


@cache
def choose(
    m: int, n: int, k: int, dtype: torch.dtype, traits: DeviceTraits, op: Op, *, bulk: bool = True
) -> LinearConfig:
    """Configuration for `m` rows of x and a weight ``[n, k]``; `bulk`: both can be copied in bulk."""
    if dtype not in (torch.bfloat16, torch.float16) or k % 16 or k == 0:
        return CUBLAS
    hopper = bulk and has_hopper_kernel(traits)
    measured = (config for most, config in MEASURED.get((n, k, op), ()) if m <= most)
    config = next(measured, None)
    if config is None or (config.kind == "hopper" and not hopper):
        config = _default(m, n, k, traits, op, hopper)
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


def _default(m: int, n: int, k: int, traits: DeviceTraits, op: Op, hopper: bool) -> LinearConfig:
    """For shapes that nobody has measured: what was best, or close to it, for those of six models of 135M to 70B.

    Found on an H200 by sweeps like those of `benchmarks/gpu/linear.py --models llama1b,llama3b,...`; the skinny
    kernel's former defaults never were.
    """
    if m == 1 and k <= 1536 and n <= 16384:
        return LinearConfig("vector", 4, 1024, num_warps=4, prefetch=4096)
    if m <= 2 and not hopper:
        return LinearConfig("vector", 8, 512, num_warps=2, prefetch=1024)
    config = None
    if hopper and m <= 32:
        fuse_norm = op.startswith("norm") and (m <= 8 or (m <= 16 and n <= 16384))
        config = _many_parts(m, n, k, traits.num_sms, fuse_norm)
    elif hopper and m <= 64 and op == "norm_linear_silu_mul":
        config = hopper_config(m, k, _block_n(n, traits.num_sms), 64, 1, fuse_norm=False)
    elif hopper and m <= 64 and n >= _WIDE_OUTPUT:
        config = hopper_config(m, k, 128, 64, 1, fuse_norm=False)
    return config or CUBLAS


_WIDE_OUTPUT = 60_000
"""Rows of the head of a language model that is not small, and of no other layer."""


def _many_parts(m: int, n: int, k: int, num_sms: int, fuse_norm: bool) -> LinearConfig | None:
    """A weight of few rows is split along its columns until nearly every multiprocessor has a program."""
    block_n, block_k = 64, 128
    split_k = 1
    while -(-n // block_n) * split_k < 0.95 * num_sms and k // (2 * split_k) >= 4 * block_k:
        split_k *= 2
    fused = hopper_config(m, k, block_n, block_k, split_k, fuse_norm=True) if fuse_norm else None
    return fused or hopper_config(m, k, block_n, block_k, split_k, fuse_norm=False)


def _block_n(n: int, num_sms: int) -> int:
    """128 rows a tile, for which x is read half as often, unless 64 keep the device much busier to the end."""

    def busy(block_n: int) -> float:
        tiles, at_once = -(-n // block_n), 2 * num_sms
        return tiles / (-(-tiles // at_once) * at_once)

    return 64 if busy(64) > 1.2 * busy(128) else 128
