"""Rotary embedding and KV write for the head layouts of real models."""

from collections.abc import Iterator
from typing import Any

from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.rope import qk_norm_rope_write_kernel, rope_config
from support.aot import AotCase

INDICES = ("qkv_stride", "block_stride", "head_stride", "slot_stride")


def cases() -> Iterator[AotCase]:
    """name, (heads, KV heads, head_dim, rot), type of the cache, norms, scales."""
    for name, (heads, kv_heads, dim, rot), cache, norms, scales in (
        ("llama8b", (32, 8, 128, 128), "bf16", False, False),
        ("llama8b_fp8", (32, 8, 128, 128), "fp8e4nv", False, True),
        ("qwen06b", (16, 8, 128, 128), "bf16", True, False),
        ("qwen06b_fp8", (16, 8, 128, 128), "fp8e4nv", True, True),
        ("smollm2", (9, 3, 64, 64), "bf16", False, False),
        ("phi2", (32, 32, 80, 32), "bf16", False, False),
        ("phi3", (32, 32, 96, 96), "bf16", False, False),
        ("gemma", (8, 4, 256, 256), "bf16", True, False),
    ):
        config = rope_config(heads, kv_heads, dim, H100)
        signature = {"qkv": "*bf16", "positions": "*i32", "slot_mapping": "*i32", "cos_sin": "*fp32"}
        signature |= {"key_cache": f"*{cache}", "value_cache": f"*{cache}", "out": "*bf16"}
        signature |= dict.fromkeys(INDICES, "i32") | {"eps": "fp32"}
        constexprs: dict[str, Any] = {
            "NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "HEAD_DIM": dim, "ROT": rot, "BLOCK_SIZE": 64,
            "HEADS": config.heads, "BLOCK": 1 << (dim - 1).bit_length(),
        }  # fmt: skip
        for names, given, kind in (
            (("q_weight", "k_weight"), norms, "*bf16"),
            (("k_scale", "v_scale"), scales, "*fp32"),
        ):
            signature |= dict.fromkeys(names, kind) if given else {}
            constexprs |= {} if given else dict.fromkeys(names)
        old = () if cache == "fp8e4nv" else (80,)
        for use_pdl, archs in ((False, old), (True, (90, 100))):
            yield AotCase(
                name,
                qk_norm_rope_write_kernel,
                signature,
                {**constexprs, "USE_PDL": use_pdl},
                config.num_warps,
                aligned=INDICES,
                archs=archs,
                options={"launch_pdl": use_pdl},
            )
