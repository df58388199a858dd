"""What `charonia_kernels.gpu.linear` launches for the two models that speed is measured with."""

from collections.abc import Iterator
from typing import Any

import torch
from charonia_kernels.gpu._launch import DeviceTraits
from charonia_kernels.gpu.linear import _prefetch_bytes
from charonia_kernels.gpu.linear_choice import choose
from charonia_kernels.gpu.linear_config import LinearConfig, Op, tile_rows
from charonia_kernels.gpu.linear_skinny import skinny_kernel
from charonia_kernels.gpu.linear_vector import vector_kernel
from support.aot import MAX_SHARED_BYTES, AotCase

LAYERS: tuple[tuple[str, Op, int, int], ...] = (
    ("llama8b qkv", "norm_linear", 6144, 4096),
    ("llama8b o", "linear_add", 4096, 4096),
    ("llama8b gate_up", "norm_linear_silu_mul", 28672, 4096),
    ("llama8b down", "linear_add", 4096, 14336),
    ("llama8b lm_head", "linear", 128256, 4096),
    ("qwen06b qkv", "norm_linear", 4096, 1024),
    ("qwen06b o", "linear_add", 1024, 2048),
    ("qwen06b gate_up", "norm_linear_silu_mul", 6144, 1024),
    ("qwen06b down", "linear_add", 1024, 3072),
    ("qwen06b lm_head", "norm_linear", 151936, 1024),
)


def _case(name: str, config: LinearConfig, op: Op, m: int, n: int, k: int, arch: int) -> AotCase:
    norm = op.startswith("norm") and config.fuse_norm
    tensors = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16"}
    absent: list[str] = ["bias_ptr"]
    for pointer, present in (("norm_weight_ptr", norm), ("residual_ptr", op == "linear_add")):
        if present:
            tensors[pointer] = "*bf16"
        else:
            absent.append(pointer)
    scalars = {"M": "i32", "N": "i32", "x_stride": "i32", "out_stride": "i32", "eps": "fp32"}
    constexprs: dict[str, Any] = {
        "BLOCK_M": tile_rows(config, m), "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "NORM": norm, "GATED": op == "norm_linear_silu_mul", "BIAS": False, "ADD": op == "linear_add",
        "USE_PDL": arch >= 90,
    }  # fmt: skip
    if config.kind == "vector":
        constexprs |= {"K": k, "PREFETCH": _prefetch_bytes(config, 2 * (k - config.block_k))}
    else:
        scalars["K"] = "i32"
        whole = k % (config.block_k * config.split_k) == 0
        ahead = _prefetch_bytes(config, 2 * k // config.split_k) if whole else 0
        constexprs |= {"SPLIT_K": config.split_k, "WHOLE_K": whole, "PREFETCH": ahead}
        if config.split_k > 1:
            tensors |= {"partials_ptr": "*fp32", "arrivals_ptr": "*i32"}
        else:
            absent += ["partials_ptr", "arrivals_ptr"]
    kernel = vector_kernel if config.kind == "vector" else skinny_kernel
    return AotCase(
        f"{name} M={m}", kernel, tensors | scalars, constexprs | dict.fromkeys(absent),
        num_warps=config.num_warps, num_stages=config.num_stages,
        aligned=("N", "K", "x_stride", "out_stride") if config.kind == "skinny" else ("N", "x_stride", "out_stride"),
        archs=(arch,), options={"launch_pdl": True} if arch >= 90 else {},
    )  # fmt: skip


def cases() -> Iterator[AotCase]:
    """The choices for 1 to 64 rows, each specialisation once."""
    for arch, sms in ((80, 108), (90, 132), (100, 148)):
        seen = set()
        traits = DeviceTraits((arch // 10, 0), sms, MAX_SHARED_BYTES[arch])
        for name, op, n, k in LAYERS:
            for m in (1, 4, 8, 64) if arch == 90 else (4, 16):
                config = choose(m, n, k, torch.bfloat16, traits, op)
                # The skinny kernel takes N and K at run time; of the others only few would be told apart.
                key = (config, tile_rows(config, m), op, k if config.kind == "vector" else 0)
                if config.kind != "cublas" and key not in seen:
                    seen.add(key)
                    yield _case(name, config, op, m, n, k, arch)
