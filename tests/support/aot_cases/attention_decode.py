"""Specialisations of the plan, decode and shared-prefix kernels for production shapes."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from charonia_kernels.gpu._attention_plan_kernel import plan_kernel
from charonia_kernels.gpu._launch import H100, DeviceTraits
from charonia_kernels.gpu.attention_cascade import cascade_config, cascade_kernel
from charonia_kernels.gpu.attention_decode import DecodeConfig, combine_width, decode_config, decode_kernel
from charonia_kernels.gpu.attention_plan import SLOTS
from support.aot import AotCase

A100 = DeviceTraits((8, 0), 108, 166_912)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}


def decode_case(
    name: str,
    *,
    group: int = 4,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    block_size: int = 64,
    queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    cascade: bool = False,
    config: DecodeConfig | None = None,
    arch: int = 90,
) -> AotCase:
    cache = cache or dtype
    rows = group * queries
    device = A100 if arch == 80 else H100
    config = config or decode_config(rows, head_dim, block_size, cache.itemsize, device)
    head_pad, rows_pad = triton.next_power_of_2(head_dim), triton.next_power_of_2(rows)
    scaled = cache == torch.float8_e4m3fn
    signature = {"q": f"*{TYPES[dtype]}", "key_cache": f"*{TYPES[cache]}", "value_cache": f"*{TYPES[cache]}"}
    signature |= {"block_table": "*i32", "items": "*i32", "out": f"*{TYPES[dtype]}"}
    if scaled:
        signature |= {"k_scale": "*fp32", "v_scale": "*fp32"}
    signature |= {"counters": "*i32", "partial_out": "*fp32", "partial_stats": "*fp32"}
    if cascade:
        signature |= {"prefix_info": "*i32", "shared_out": "*fp32", "shared_stats": "*fp32"}
    signature |= {
        "scale": "fp32",
        "q_stride": "i32",
        "block_stride": "i32",
        "table_stride": "i32",
        "batch": "i32",
    }
    absent = ([] if scaled else ["k_scale", "v_scale"]) + (
        [] if cascade else ["prefix_info", "shared_out", "shared_stats"]
    )
    constexprs: dict[str, Any] = dict.fromkeys(absent)
    constexprs |= {
        "NUM_KV_HEADS": num_kv_heads, "G": group, "HEAD_DIM": head_dim, "HEAD_PAD": head_pad,
        "BLOCK_SIZE": block_size, "R": rows, "R_PAD": rows_pad, "ROWS": max(16, rows_pad), "WINDOW": window,
        "SOFT_CAP": soft_cap, "HAS_CASCADE": cascade, "TILE": config.tile,
        "WIDTH": combine_width(rows_pad, head_pad, config.num_warps), "USE_PDL": arch >= 90,
    }  # fmt: skip
    archs = (80,) if arch == 80 else (90, 100)
    return AotCase(
        name, decode_kernel, signature, constexprs, config.num_warps, config.num_stages,
        ("q_stride", "block_stride"), archs,
    )  # fmt: skip


def cascade_case(
    name: str,
    *,
    group: int = 4,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    window: int = 0,
    arch: int = 90,
) -> AotCase:
    """A model with blocks of 64."""
    cache = cache or dtype
    config = cascade_config(128, head_dim, cache.itemsize, A100 if arch == 80 else H100)
    scaled = cache == torch.float8_e4m3fn
    signature = {"q": f"*{TYPES[dtype]}", "key_cache": f"*{TYPES[cache]}", "value_cache": f"*{TYPES[cache]}"}
    signature |= {"block_table": "*i32"} | ({"k_scale": "*fp32"} if scaled else {})
    signature |= {"entries": "*i32", "prefix_info": "*i32", "shared_out": "*fp32", "shared_stats": "*fp32"}
    signature |= {
        "scale": "fp32",
        "q_stride": "i32",
        "block_stride": "i32",
        "table_stride": "i32",
        "batch": "i32",
    }
    constexprs: dict[str, Any] = {} if scaled else {"k_scale": None}
    constexprs |= {
        "NUM_KV_HEADS": num_kv_heads, "G": group, "HEAD_DIM": head_dim, "HEAD_PAD": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": 64, "R": group, "WINDOW": window, "SOFT_CAP": 0.0, "ROWS": config.rows, "TILE": config.tile,
        "USE_PDL": arch >= 90,
    }  # fmt: skip
    archs = (80,) if arch == 80 else (90, 100)
    return AotCase(
        name, cascade_kernel, signature, constexprs, config.num_warps, config.num_stages,
        ("q_stride", "block_stride"), archs,
    )  # fmt: skip


def plan_case(name: str, *, levels: int, cascade: bool, arch: int = 90) -> AotCase:
    """The lists of a model with 8 KV heads and blocks of 64."""
    pointers = ["query_start_loc", "seq_lens", "rows", *(["common_prefix_len"] if cascade else [])]
    pointers += ["decode_items", "prefill_items", "counters", "entries", "prefix_info"]
    signature = dict.fromkeys(pointers, "*i32")
    signature |= dict.fromkeys(("batch", "decode_slots", "prefill_slots", "shared_chunks"), "i32")
    constexprs: dict[str, Any] = {} if cascade else {"common_prefix_len": None}
    constexprs |= {
        "HAS_DECODES": True, "MAX_DECODE_QUERY_LEN": 1, "TILE_TOKENS": 32, "BLOCK_SIZE": 64, "TARGET_ITEMS": 66,
        "MIN_CHUNK": 128, "ALIGN": 64, "SHARED_ALIGN": 128, "NUM_COUNTERS": 1056, "SLOTS": SLOTS,
        "BLOCK_B": 1 << levels, "LEVELS": levels, "USE_PDL": arch >= 90,
    }  # fmt: skip
    return AotCase(name, plan_kernel, signature, constexprs, 8, 3, (), (80,) if arch == 80 else (90, 100))


def cases() -> Iterator[AotCase]:
    fp8 = torch.float8_e4m3fn
    for arch in (80, 90):
        for block_size in (16, 32, 64, 128):
            yield decode_case(f"decode llama8b block {block_size}", block_size=block_size, arch=arch)
        yield decode_case("decode qwen06b", group=2, arch=arch)
        yield decode_case("decode group 1 fp16", group=1, num_kv_heads=32, dtype=torch.float16, arch=arch)
        yield decode_case("decode group 16", group=16, num_kv_heads=2, arch=arch)
        yield decode_case("decode 8 queries", group=8, queries=8, arch=arch)
        yield decode_case("decode 4 queries", queries=4, arch=arch)
        yield decode_case(
            "decode window and cap", window=4096, soft_cap=50.0, head_dim=256, group=2, arch=arch
        )
        yield decode_case("decode head 80", head_dim=80, group=1, arch=arch)
        yield decode_case("decode head 64", head_dim=64, group=3, arch=arch)
        yield decode_case("decode fp32", dtype=torch.float32, arch=arch)
        yield decode_case("decode after cascade", cascade=True, arch=arch)
        yield cascade_case("cascade llama8b", arch=arch)
        yield cascade_case("cascade window", group=2, window=4096, arch=arch)
        yield cascade_case("cascade head 256", head_dim=256, group=2, num_kv_heads=4, window=1024, arch=arch)
        yield cascade_case("cascade head 256 fp32", head_dim=256, dtype=torch.float32, arch=arch)
        yield plan_case("plan 32", levels=5, cascade=False, arch=arch)
        yield plan_case("plan 1024", levels=10, cascade=True, arch=arch)
    for block_size in (16, 64):
        yield decode_case(f"decode fp8 block {block_size}", cache=fp8, block_size=block_size)
    yield decode_case("decode fp8 head 256", cache=fp8, head_dim=256, group=8)
    yield cascade_case("cascade head 256 fp8", head_dim=256, cache=fp8)
