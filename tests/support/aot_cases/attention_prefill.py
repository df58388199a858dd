"""Prefill attention as the launcher asks for it: real models' shapes on each architecture."""

from collections.abc import Iterator
from typing import Any

import torch
from charonia_kernels.gpu._launch import H100, DeviceTraits
from charonia_kernels.gpu.attention_prefill import ITEM_ROWS, prefill_config, prefill_kernel
from support.aot import AotCase

DEVICES = {80: DeviceTraits((8, 0), 108, 166_912), 90: H100, 100: DeviceTraits((10, 0), 148, 232_448)}
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}


def cases() -> Iterator[AotCase]:
    """name, G, head_dim, block_size, types of queries and cache, window, soft cap."""
    for name, group, dim, block_size, dtype, cache, window, cap in (
        ("llama8b", 4, 128, 64, "bf16", "bf16", 0, 0.0),
        ("llama8b_blocks_of_16", 4, 128, 16, "bf16", "bf16", 0, 0.0),
        ("llama8b_fp8", 4, 128, 64, "bf16", "fp8e4nv", 0, 0.0),
        ("llama8b_fp32", 4, 128, 64, "fp32", "fp32", 0, 0.0),
        ("qwen06b", 2, 128, 64, "fp16", "fp16", 0, 0.0),
        ("smollm2", 3, 64, 64, "bf16", "bf16", 0, 0.0),
        ("phi2", 1, 80, 64, "bf16", "bf16", 0, 0.0),
        ("gemma2", 2, 256, 64, "bf16", "bf16", 4096, 50.0),
        ("gemma3", 4, 256, 64, "bf16", "bf16", 512, 0.0),
    ):
        for arch, device in DEVICES.items():
            if cache == "fp8e4nv" and arch == 80:
                continue
            config = prefill_config(dim, block_size, TYPES[dtype], TYPES[cache], device, portable=True)
            signature = {"q_ptr": f"*{dtype}", "key_ptr": f"*{cache}", "value_ptr": f"*{cache}"}
            signature |= {"table_ptr": "*i32", "items_ptr": "*i32", "out_ptr": f"*{dtype}"}
            constexprs: dict[str, Any] = {
                "G": group, "HEAD_DIM": dim, "HEAD_PAD": 1 << (dim - 1).bit_length(), "BLOCK_SIZE": block_size,
                "WINDOW": window, "SOFT_CAP": cap, "ITEM_ROWS": ITEM_ROWS, "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n, "USE_PDL": device.has_pdl,
            }  # fmt: skip
            if cache == "fp8e4nv":
                signature |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
            else:
                constexprs |= {"k_scale_ptr": None, "v_scale_ptr": None}
            signature |= {"scale": "fp32", "q_stride": "i32", "out_stride": "i32", "table_stride": "i32"}
            yield AotCase(
                f"{name}_sm{arch}",
                prefill_kernel,
                signature,
                constexprs,
                num_warps=config.num_warps,
                num_stages=config.stages,
                aligned=("q_stride", "out_stride"),
                archs=(arch,),
                options={"launch_pdl": device.has_pdl},
            )
