"""How a linear layer is computed: a function of its shape and the device."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from charonia_kernels.gpu._launch import DeviceTraits

Op = Literal["linear", "norm_linear", "norm_linear_silu_mul", "linear_add"]


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """What computes a linear layer, and its tile.

    kind: "vector" (`linear_vector`), "skinny" (`linear_skinny`), or "cublas" for PyTorch's matmul, to which nothing
    below applies. block_m: least height of the tile; it holds all rows of x, so more of them make it higher. block_n,
    block_k: rows and columns of a tile of the weight. split_k: programs that share the columns of a row. prefetch:
    bytes of each row, a power of two, that a program asks for before the kernel in front of it has ended.
    fuse_norm: the norm of x is taken on the way, not by a kernel of its own.
    """

    kind: Literal["vector", "skinny", "cublas"]
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0
    block_m: int = 1
    fuse_norm: bool = True

    def shared_bytes(self, m: int, itemsize: int) -> int:
        """Shared memory that the pipeline of "skinny" takes; a fused norm takes one more tile of x."""
        block_m = tile_rows(self, m)
        tiles = self.num_stages * (self.block_n + block_m) + (block_m if self.fuse_norm else 0)
        return tiles * self.block_k * itemsize


CUBLAS = LinearConfig("cublas", fuse_norm=False)
MAX_VECTOR_ROWS = 8
MAX_SKINNY_ROWS = 128
_RESERVED_BYTES = 2048  # of shared memory: reductions, barriers, and what the driver keeps

# Measured on an H100 (benchmarks/gpu/linear.py): (rows, columns of the weight, op) -> what is best up to so many rows
# of x, in growing order; past the last the default holds.
MEASURED: dict[tuple[int, int, Op], tuple[tuple[int, LinearConfig], ...]] = {}


def tile_rows(config: LinearConfig, m: int) -> int:
    """Height of the tile for `m` rows of x."""
    return max(config.block_m, 1 << max(m - 1, 0).bit_length())


@cache
def choose(m: int, n: int, k: int, dtype: torch.dtype, traits: DeviceTraits, op: Op) -> LinearConfig:
    """Configuration for `m` rows of x and a weight ``[n, k]``."""
    if dtype not in (torch.bfloat16, torch.float16) or k % 16 or k == 0:
        return CUBLAS
    measured = (config for most, config in MEASURED.get((n, k, op), ()) if m <= most)
    config = next(measured, None) or _default(m, n, k, traits, op)
    if config.kind == "skinny":
        if dtype == torch.float16:  # x * norm_weight is rounded before it is scaled, and might not fit
            config = replace(config, fuse_norm=False)
        while config.shared_bytes(m, dtype.itemsize) > traits.max_shared_bytes - _RESERVED_BYTES:
            if config.num_stages == 2:
                return CUBLAS
            config = replace(config, num_stages=config.num_stages - 1)
    return config


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
