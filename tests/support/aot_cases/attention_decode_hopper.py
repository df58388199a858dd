"""Decode attention's Hopper kernel as the launcher asks for it, and as its benchmark does."""

from collections.abc import Iterator
from typing import Any

from charonia_kernels.gpu.attention_decode_hopper import (
    HopperDecodeConfig,
    decode_hopper_kernel,
    hopper_decode_config,
    kernel_constants,
)
from support.aot import AotCase
from triton.experimental.gluon import language as gl


def _case(
    name: str, group: int, num_kv_heads: int, dim: int, block_size: int, dtype: str, soft_cap: float,
    config: HopperDecodeConfig,
) -> AotCase:  # fmt: skip
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptor = (
        f"tensordesc<{dtype}[{min(block_size, config.tile)}, {1 << (dim - 1).bit_length()}],{layout!r}>"
    )
    signature = {"key_desc": descriptor, "value_desc": descriptor}
    signature |= dict.fromkeys(("q", "key_cache", "value_cache"), f"*{dtype}")
    signature |= {"block_table": "*i32", "items": "*i32", "out": f"*{dtype}", "counters": "*i32"}
    signature |= {"partial_out": "*fp32", "partial_stats": "*fp32", "scale": "fp32"}
    signature |= {"q_stride": "i32", "table_stride": "i32"}
    constexprs: dict[str, Any] = {
        "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size, "SOFT_CAP": soft_cap, "USE_PDL": True,
    }  # fmt: skip
    return AotCase(
        name,
        decode_hopper_kernel,
        signature,
        constexprs | kernel_constants(group, dim, config),
        num_warps=config.num_warps,
        aligned=("q_stride",),
        archs=(90,),
        options={"launch_pdl": True},
    )


def cases() -> Iterator[AotCase]:
    """name, heads a KV head, KV heads, head_dim, block_size, type, soft cap, configuration or None."""
    for name, group, heads, dim, block_size, dtype, soft_cap, config in (
        ("llama8b", 4, 8, 128, 64, "bf16", 0.0, None),
        ("llama8b_small_batch", 4, 8, 128, 64, "bf16", 0.0, hopper_decode_config(1, 4, 128)),
        ("llama8b_8_warps", 4, 8, 128, 64, "bf16", 0.0, HopperDecodeConfig(256, 1, 1, num_warps=8)),
        ("llama8b_late", 4, 8, 128, 64, "bf16", 0.0, HopperDecodeConfig(64, 2, 2, early=False)),
        ("qwen06b", 2, 8, 128, 64, "bf16", 0.0, None),
        ("qwen06b_small_batch", 2, 8, 128, 64, "bf16", 0.0, hopper_decode_config(1, 2, 128)),
        ("qwen06b_blocks_of_128", 2, 8, 128, 128, "fp16", 0.0, None),
        ("smollm2", 3, 3, 64, 64, "bf16", 0.0, None),
        ("phi3", 1, 32, 96, 64, "bf16", 0.0, None),
        ("rows_of_16", 16, 2, 128, 64, "bf16", 0.0, None),
        ("gemma3", 4, 1, 256, 64, "bf16", 0.0, None),
        ("soft_cap", 2, 8, 128, 64, "bf16", 50.0, None),
    ):
        config = config or hopper_decode_config(64, group, dim)
        yield _case(name, group, heads, dim, block_size, dtype, soft_cap, config)
