"""What `charonia_kernels.gpu.linear_hopper` may be asked for by the two models that speed is measured with."""

from collections.abc import Iterator
from typing import Any

from charonia_kernels.gpu.linear_config import LinearConfig, Op, hopper_config, tile_rows
from charonia_kernels.gpu.linear_hopper import (
    COPY_REGISTERS,
    SCALE_REGISTERS,
    hopper_kernel,
    launch_registers,
)
from support.aot import AotCase
from triton.experimental.gluon import language as gl

CASES: tuple[tuple[str, Op, int, int, LinearConfig | None], ...] = (
    ("llama8b qkv", "norm_linear", 8, 4096, hopper_config(8, 4096, 64, 128, 1, fuse_norm=True)),
    ("llama8b qkv", "norm_linear", 64, 4096, hopper_config(64, 4096, 64, 64, 2, fuse_norm=True)),
    ("llama8b o", "linear_add", 16, 4096, hopper_config(16, 4096, 64, 128, 2, fuse_norm=False)),
    ("llama8b gate_up", "norm_linear_silu_mul", 8, 4096, hopper_config(8, 4096, 64, 64, 1, fuse_norm=True, per_sm=3)),
    ("llama8b gate_up", "norm_linear_silu_mul", 64, 4096, hopper_config(64, 4096, 128, 64, 1, fuse_norm=True)),
    (
        "llama8b gate_up, 8 warps", "norm_linear_silu_mul", 64, 4096,
        hopper_config(64, 4096, 128, 64, 1, fuse_norm=False, num_warps=8),
    ),
    ("llama8b gate_up", "norm_linear_silu_mul", 128, 4096, hopper_config(128, 4096, 64, 64, 1, fuse_norm=True)),
    ("llama8b gate_up", "norm_linear_silu_mul", 128, 4096, hopper_config(128, 4096, 128, 64, 1, fuse_norm=False)),
    ("llama8b down", "linear_add", 64, 14336, hopper_config(64, 14336, 128, 64, 4, fuse_norm=False, num_warps=8)),
    ("llama8b down", "linear_add", 64, 14336, hopper_config(64, 14336, 128, 64, 4, fuse_norm=False)),
    ("llama8b down", "linear_add", 128, 14336, hopper_config(128, 14336, 64, 64, 2, fuse_norm=False)),
    ("llama8b down", "linear_add", 128, 14336, hopper_config(128, 14336, 128, 64, 4, fuse_norm=False, num_warps=8)),
    ("qwen06b qkv", "norm_linear", 64, 1024, hopper_config(64, 1024, 64, 128, 2, fuse_norm=True)),
    ("qwen06b o", "linear_add", 64, 2048, hopper_config(64, 2048, 64, 128, 8, fuse_norm=False)),
    ("qwen06b o, x tall", "linear_add", 64, 2048, hopper_config(64, 2048, 32, 128, 4, fuse_norm=False, x_major=True)),
    (
        "qwen06b gate_up, x tall", "norm_linear_silu_mul", 64, 1024,
        hopper_config(64, 1024, 32, 64, 2, fuse_norm=True, x_major=True),
    ),
    (
        "qwen06b down, x tall", "linear_add", 64, 3072,
        hopper_config(64, 3072, 16, 128, 2, fuse_norm=False, x_major=True),
    ),
    ("qwen06b lm_head", "norm_linear", 32, 1024, hopper_config(32, 1024, 128, 128, 1, fuse_norm=False)),
)  # fmt: skip


def _case(name: str, op: Op, m: int, k: int, config: LinearConfig) -> AotCase:
    norm, gated = op.startswith("norm") and config.fuse_norm, op == "norm_linear_silu_mul"
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_rows = config.block_n // 2 if gated else config.block_n
    signature = {
        "x_desc": f"tensordesc<bf16[{tile_rows(config, m)}, {config.block_k}],{layout!r}>",
        "w_desc": f"tensordesc<bf16[{w_rows}, {config.block_k}],{layout!r}>",
        "out_ptr": "*bf16", "M": "i32", "N": "i32", "out_stride": "i32", "eps": "fp32",
    }  # fmt: skip
    optional = {
        "norm_weight_ptr": ("*bf16", norm), "bias_ptr": ("*bf16", False), "residual_ptr": ("*bf16", op == "linear_add"),
        "partials_ptr": ("*fp32", config.split_k > 1), "arrivals_ptr": ("*i32", config.split_k > 1),
    }  # fmt: skip
    signature |= {pointer: kind for pointer, (kind, present) in optional.items() if present}
    constexprs: dict[str, Any] = {
        "K": k, "BLOCK_N": config.block_n, "W_STAGES": config.num_stages, "X_STAGES": config.x_stages,
        "SPLIT_K": config.split_k, "X_MAJOR": config.x_major, "NORM": norm, "GATED": gated, "BIAS": False,
        "ADD": op == "linear_add", "USE_PDL": True, "COPY_REGISTERS": COPY_REGISTERS,
        "SCALE_REGISTERS": SCALE_REGISTERS,
    }  # fmt: skip
    constexprs |= dict.fromkeys(pointer for pointer, (_, present) in optional.items() if not present)
    return AotCase(
        f"{name} M={m} {config.block_n}x{config.block_k}/{config.split_k} {config.num_stages}+{config.x_stages}",
        hopper_kernel,
        signature,
        constexprs,
        num_warps=config.num_warps,
        aligned=("N", "out_stride"),
        archs=(90,),
        options={"launch_pdl": True, "maxnreg": launch_registers(config, m, norm)},
    )


def cases() -> Iterator[AotCase]:
    """Tall and wide tiles, with and without each of what is fused."""
    for name, op, m, k, config in CASES:
        assert config is not None, name
        yield _case(name, op, m, k, config)
