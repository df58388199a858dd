"""Prefill attention's Hopper kernel as the launcher asks for it."""

from collections.abc import Iterator
from typing import Any

import torch
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.attention_prefill import prefill_config
from charonia_kernels.gpu.attention_prefill_hopper import prefill_kernel
from support.aot import AotCase
from triton.experimental.gluon import language as gl


def cases() -> Iterator[AotCase]:
    """name, G, head_dim, block_size, type, window, soft cap."""
    for name, group, dim, block_size, dtype, window, cap in (
        ("llama8b", 4, 128, 64, "bf16", 0, 0.0),
        ("llama8b_blocks_of_16", 4, 128, 16, "bf16", 0, 0.0),
        ("qwen06b_blocks_of_128", 2, 128, 128, "fp16", 0, 0.0),
        ("smollm2", 3, 64, 64, "bf16", 0, 0.0),
        ("phi2", 1, 80, 64, "bf16", 0, 0.0),
        ("mistral", 4, 128, 64, "bf16", 4096, 0.0),
        ("soft_cap", 2, 128, 64, "bf16", 0, 50.0),
    ):
        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        config = prefill_config(dim, block_size, kind, kind, H100, portable=False)
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        box = f"{min(block_size, config.block_n)}, {1 << (dim - 1).bit_length()}"
        descriptor = f"tensordesc<{dtype}[{box}],{layout!r}>"
        signature = {"key_desc": descriptor, "value_desc": descriptor, "q_ptr": f"*{dtype}"}
        signature |= {"table_ptr": "*i32", "items_ptr": "*i32", "out_ptr": f"*{dtype}", "scale": "fp32"}
        signature |= dict.fromkeys(("q_stride", "out_stride", "table_stride"), "i32")
        for ping_pong in (False, True):
            constexprs: dict[str, Any] = {
                "G": group, "HEAD_DIM": dim, "BLOCK_SIZE": block_size, "WINDOW": window, "SOFT_CAP": cap,
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "STAGES": config.stages,
                "PING_PONG": ping_pong, "USE_PDL": True,
            }  # fmt: skip
            yield AotCase(
                f"{name}_ping_pong" if ping_pong else name,
                prefill_kernel,
                signature,
                constexprs,
                num_warps=4,
                aligned=("q_stride", "out_stride"),
                archs=(90,),
                options={"launch_pdl": True},
            )
