"""The best configurations measured (`benchmarks/gpu/linear.py`): weight and op -> up to so many rows of x.

Shapes are those of Llama 3.1 8B and Qwen3 0.6B; others take the defaults of `linear_choice`. Measured at 1, 2, 4, 8,
16, 32, 48, 64, 96 and 128 rows on an H100, "hopper" from 16 to 64 rows on an H200.
"""

from charonia_kernels.gpu.linear_config import CUBLAS, LinearConfig, Op


def _vector(block_n: int, block_k: int, num_warps: int, prefetch: int) -> LinearConfig:
    return LinearConfig("vector", block_n, block_k, num_warps=num_warps, prefetch=prefetch)


def _skinny(
    block_n: int,
    block_k: int,
    split_k: int,
    num_warps: int,
    num_stages: int,
    prefetch: int,
    fuse_norm: bool = True,
) -> LinearConfig:
    return LinearConfig(
        "skinny", block_n, block_k, split_k, num_warps, num_stages, prefetch, block_m=16, fuse_norm=fuse_norm
    )


def _hopper(
    block_n: int, block_k: int, split_k: int, num_warps: int, num_stages: int, x_stages: int, block_m: int,
    fuse_norm: bool = True, x_major: bool = False,
) -> LinearConfig:  # fmt: skip
    return LinearConfig(
        "hopper", block_n, block_k, split_k, num_warps, num_stages, block_m=block_m, fuse_norm=fuse_norm,
        x_stages=x_stages, x_major=x_major,
    )  # fmt: skip


MEASURED: dict[tuple[int, int, Op], tuple[tuple[int, LinearConfig], ...]] = {
    (6144, 4096, "norm_linear"): (
        (1, _vector(2, 2048, 4, 0)),
        (2, _vector(8, 512, 2, 1024)),
        (8, _hopper(64, 128, 1, 4, 5, 5, 8)),
        (16, _hopper(64, 128, 2, 4, 5, 5, 8)),
        (64, _skinny(64, 128, 1, 4, 5, 2048, fuse_norm=False)),
        (128, CUBLAS),
    ),
    (4096, 4096, "linear_add"): (
        (2, _vector(8, 1024, 4, 4096)),
        (8, _hopper(64, 128, 4, 4, 6, 6, 8, fuse_norm=False)),
        (16, _hopper(64, 128, 4, 4, 5, 5, 8, fuse_norm=False)),
        (32, _hopper(64, 128, 2, 4, 4, 4, 8, fuse_norm=False)),
        (128, CUBLAS),
    ),
    (28672, 4096, "norm_linear_silu_mul"): (
        (1, _vector(2, 2048, 4, 0)),
        (2, _vector(2, 512, 2, 1024)),
        (8, _hopper(64, 128, 1, 4, 5, 5, 8)),
        (16, _hopper(128, 64, 1, 4, 5, 5, 8)),
        (32, _hopper(128, 64, 1, 4, 5, 5, 8, fuse_norm=False)),
        (64, _hopper(128, 64, 1, 4, 4, 4, 8, fuse_norm=False)),
        (128, _skinny(128, 64, 1, 8, 5, 1024, fuse_norm=False)),
    ),
    (4096, 14336, "linear_add"): (
        (2, _vector(8, 1024, 4, 4096)),
        (8, _hopper(64, 128, 4, 4, 6, 6, 8, fuse_norm=False)),
        (16, _hopper(64, 128, 4, 4, 5, 5, 8, fuse_norm=False)),
        (32, _skinny(64, 128, 2, 4, 5, 0)),
        (64, _skinny(64, 128, 2, 4, 5, 2048)),
        (96, CUBLAS),
        (128, _skinny(64, 64, 2, 4, 6, 2048)),
    ),
    (128256, 4096, "norm_linear"): (
        (2, _vector(2, 2048, 4, 0)),
        (8, _hopper(64, 128, 1, 4, 5, 5, 8)),
        (16, _hopper(64, 128, 1, 4, 5, 5, 8, fuse_norm=False)),
        (32, _hopper(64, 128, 1, 4, 4, 4, 8, fuse_norm=False)),
        (64, _hopper(128, 64, 1, 4, 4, 4, 8, fuse_norm=False)),
        (96, _skinny(128, 64, 1, 8, 5, 1024, fuse_norm=False)),
        (128, _skinny(128, 64, 1, 4, 5, 1024, fuse_norm=False)),
    ),
    (4096, 1024, "norm_linear"): (
        (1, _vector(4, 1024, 4, 4096)),
        (2, _vector(8, 512, 2, 1024)),
        (4, _vector(4, 512, 2, 1024)),
        (16, _hopper(64, 128, 4, 4, 2, 2, 8)),
        (48, _skinny(64, 128, 1, 4, 5, 2048, fuse_norm=False)),
        (128, CUBLAS),
    ),
    (1024, 2048, "linear_add"): (
        (1, _vector(4, 2048, 8, 4096)),
        (2, _vector(2, 1024, 4, 4096)),
        (4, _vector(1, 2048, 4, 4096)),
        (16, _hopper(64, 128, 8, 4, 2, 2, 8, fuse_norm=False)),
        (32, _skinny(64, 128, 4, 4, 5, 2048)),
        (48, _skinny(32, 128, 4, 4, 6, 2048)),
        (64, _hopper(16, 128, 2, 4, 8, 4, 64, fuse_norm=False, x_major=True)),
        (128, CUBLAS),
    ),
    (6144, 1024, "norm_linear_silu_mul"): (
        (2, _vector(4, 512, 2, 1024)),
        (4, _vector(8, 512, 2, 1024)),
        (8, _hopper(64, 128, 1, 4, 6, 5, 8)),
        (16, _hopper(64, 128, 1, 4, 5, 5, 8)),
        (32, _hopper(64, 128, 1, 4, 4, 4, 8, fuse_norm=False)),
        (64, _hopper(64, 64, 1, 4, 6, 6, 8, fuse_norm=False)),
        (128, CUBLAS),
    ),
    (1024, 3072, "linear_add"): (
        (1, _vector(8, 1024, 4, 4096)),
        (2, _vector(2, 1024, 4, 4096)),
        (4, _vector(4, 1024, 4, 4096)),
        (16, _hopper(64, 128, 8, 4, 3, 3, 8, fuse_norm=False)),
        (64, _skinny(64, 128, 4, 4, 5, 2048)),
        (128, CUBLAS),
    ),
    (151936, 1024, "norm_linear"): (
        (1, _vector(2, 1024, 4, 4096)),
        (2, _vector(4, 1024, 4, 4096)),
        (4, _skinny(64, 128, 1, 4, 5, 0)),
        (8, _hopper(64, 128, 1, 4, 6, 6, 8, fuse_norm=False)),
        (16, _hopper(64, 128, 1, 4, 5, 5, 8, fuse_norm=False)),
        (32, _hopper(64, 128, 1, 4, 4, 4, 8, fuse_norm=False)),
        (64, _hopper(128, 64, 1, 4, 4, 4, 8, fuse_norm=False)),
        (128, _skinny(128, 64, 1, 8, 5, 1024, fuse_norm=False)),
    ),
}
