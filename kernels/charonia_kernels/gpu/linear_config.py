"""What computes a linear layer."""

from dataclasses import dataclass, replace
from typing import Literal

Op = Literal["linear", "norm_linear", "norm_linear_silu_mul", "linear_add"]


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """What computes a linear layer, and its tile.

    kind: "vector" (`linear_vector`), "skinny" (`linear_skinny`), "hopper" (`linear_hopper`), or "cublas" for PyTorch's
    matmul, to which nothing below applies. block_m: least height of the tile; it holds all rows of x, so more of them
    make it higher. block_n, block_k: rows and columns of a tile of the weight. split_k: programs that share the columns
    of a row. num_warps: of "hopper" those that multiply. num_stages: tiles of the weight under way. prefetch: bytes of
    each row, a power of two, that a program of "vector" or "skinny" asks for before the kernel in front of it has
    ended. fuse_norm: the norm of x is taken on the way, not by a kernel of its own. x_stages: tiles of x under way in
    "hopper". x_major: there x is the tall operand of the tensor cores, and block_n may be less than 64.
    """

    kind: Literal["vector", "skinny", "hopper", "cublas"]
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0
    block_m: int = 1
    fuse_norm: bool = True
    x_stages: int = 0
    x_major: bool = False

    def shared_bytes(self, m: int, itemsize: int) -> int:
        """Shared memory that the pipeline of "skinny" takes; a fused norm takes one more tile of x."""
        block_m = tile_rows(self, m)
        tiles = self.num_stages * (self.block_n + block_m) + (block_m if self.fuse_norm else 0)
        return tiles * self.block_k * itemsize


CUBLAS = LinearConfig("cublas", fuse_norm=False)
MAX_VECTOR_ROWS = 8
MAX_SKINNY_ROWS = 128
HOPPER_SM_BYTES = 228 * 1024
"""Shared memory of a multiprocessor of Hopper."""
_HOPPER_EXTRA_BYTES = 2560  # what the driver keeps of each program, barriers, sums of squares


def hopper_config(
    m: int,
    k: int,
    block_n: int,
    block_k: int,
    split_k: int,
    *,
    fuse_norm: bool,
    num_warps: int = 4,
    per_sm: int = 2,
    x_major: bool = False,
) -> LinearConfig | None:
    """A configuration of "hopper" whose rings let `per_sm` programs share a multiprocessor; None if none fits.

    As many tiles of x as of the weight are under way: fewer of x, and its way from the L2 cache holds up the products.
    The sums take the place of the weight in the end, so its ring has room for them.
    """
    config = LinearConfig(
        "hopper",
        block_n,
        block_k,
        split_k,
        num_warps,
        block_m=64 if x_major else 8,
        fuse_norm=fuse_norm,
        x_major=x_major,
    )
    steps = -(-k // (block_k * split_k))
    w_bytes, x_bytes = 2 * block_n * block_k, 2 * tile_rows(config, m) * block_k
    room = HOPPER_SM_BYTES // per_sm - _HOPPER_EXTRA_BYTES
    if fuse_norm:
        room -= 4 * (1 << (steps - 1).bit_length()) * block_k
    least = -(-2 * tile_rows(config, m) // block_k)
    both = min(steps, room // (w_bytes + x_bytes))
    num_stages = max(both, least)
    x_stages = min(both, (room - num_stages * w_bytes) // x_bytes)
    if x_stages < min(steps, 2):
        return None
    return replace(config, num_stages=num_stages, x_stages=x_stages)


def tile_rows(config: LinearConfig, m: int) -> int:
    """Height of the tile for `m` rows of x."""
    return max(config.block_m, 1 << max(m - 1, 0).bit_length())
