"""The layers that `linear.py` times, and the configurations worth trying for each."""

import math
from dataclasses import dataclass, replace
from typing import Any

import other_models
import torch
import workloads
from charonia_kernels.gpu._launch import H100, INTERPRETED, traits
from charonia_kernels.gpu.linear_choice import choose, has_hopper_kernel
from charonia_kernels.gpu.linear_config import CUBLAS, LinearConfig, Op, hopper_config, tile_rows

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@dataclass(frozen=True)
class Layer:
    """A weight [n, k] and what is done with it."""

    name: str
    op: Op
    n: int
    k: int

    @property
    def num_bytes(self) -> int:
        """Of the weight."""
        return 2 * self.n * self.k


@dataclass(frozen=True)
class Model:
    """The layers of a decoder in order, qkv, o, gate_up, down; then the head."""

    num_layers: int
    layers: tuple[Layer, ...]
    head: Layer


def model(config: dict[str, Any]) -> Model:
    """The decoder of a config.json."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    return Model(
        config["num_hidden_layers"],
        (
            Layer("qkv", "norm_linear", queries + 2 * keys, hidden),
            Layer("o", "linear_add", hidden, queries),
            Layer("gate_up", "norm_linear_silu_mul", 2 * inner, hidden),
            Layer("down", "linear_add", hidden, inner),
        ),
        Layer("lm_head", "norm_linear", config["vocab_size"], hidden),
    )


HALF_OF_LLAMA_70B = other_models.decoder("LlamaForCausalLM", 8192, 80, 32, 4, 128, 14336, 64128)
CONFIGS = {name: workloads.MODELS[name] for name in ("llama8b", "qwen06b")} | {
    # What the defaults of `linear_choice` were measured with.
    "smollm": other_models.MODELS["SmolLM2 135M"],
    "llama1b": other_models.MODELS["Llama 3.2 1B"],
    "llama3b": other_models.MODELS["Llama 3.2 3B"],
    "qwen4b": other_models.MODELS["Qwen3 4B"],
    "qwen7b": other_models.MODELS["Qwen2.5 7B"],
    "llama70b": HALF_OF_LLAMA_70B,
}
MODELS = {name: model(config) for name, config in CONFIGS.items()}
TINY = {
    "tiny": model(other_models.decoder("LlamaForCausalLM", 64, 2, 8, 4, 16, 96, 160)),
}


VECTOR = (  # block_n, block_k, num_warps, prefetch
    (1, 2048, 4, 4096), (2, 2048, 4, 4096), (2, 2048, 4, 0), (4, 2048, 8, 4096), (2, 1024, 4, 4096),
    (4, 1024, 4, 4096), (8, 1024, 4, 4096), (2, 512, 2, 1024), (4, 512, 2, 1024), (8, 512, 2, 1024),
    (16, 256, 1, 1024),
)  # fmt: skip
SKINNY = (  # block_n, block_k, num_warps, num_stages, prefetch
    (16, 256, 4, 6, 2048), (32, 256, 4, 4, 2048), (32, 128, 4, 6, 2048), (64, 128, 4, 3, 2048),
    (64, 128, 4, 5, 2048), (64, 128, 4, 5, 0), (64, 256, 4, 3, 2048), (64, 64, 4, 6, 2048),
    (128, 64, 4, 5, 1024), (128, 64, 8, 5, 1024), (128, 128, 8, 3, 1024),
)  # fmt: skip


def vector_candidates(layer: Layer, m: int) -> list[LinearConfig]:
    """Configurations whose sums fit a thread's registers."""
    found = []
    for block_n, block_k, num_warps, prefetch in VECTOR:
        config = LinearConfig("vector", block_n, block_k, num_warps=num_warps, prefetch=prefetch)
        sums = tile_rows(config, m) * block_n * max(1, block_k // (256 * num_warps))
        if sums > 32 or block_k > layer.k or (layer.op == "norm_linear_silu_mul" and block_n < 2):
            continue
        if layer.k % block_k and block_k > 1024:
            continue
        found.append(config)
    return found


def skinny_candidates(layer: Layer, m: int) -> list[LinearConfig]:
    """Configurations that fit shared memory and give the device enough to do."""
    found = []
    for block_n, block_k, num_warps, num_stages, prefetch in SKINNY:
        tiles = math.ceil(layer.n / block_n)
        if (block_n == 128 and m <= 16) or (block_n < 64 and m > 64) or (block_n == 16 and tiles > 800):
            continue
        for split_k in (1, 2, 4, 8):
            programs = tiles * split_k
            if split_k > 1 and (programs > 300 or layer.k // split_k < 512 or layer.k % (split_k * block_k)):
                continue
            if programs < min(64, H100.num_sms * layer.n // 2048) or (split_k > 2 and programs > 150):
                continue
            config = LinearConfig("skinny", block_n, block_k, split_k, num_warps, num_stages, prefetch, 16)
            if config.shared_bytes(m, 2) < traits(DEVICE).max_shared_bytes - 2048:
                found.append(config)
    if m == 8:  # mma.m16n8k16 instead of wgmma
        found += [replace(config, block_m=8) for config in found if config.block_k == 256]
    if layer.op.startswith("norm") and m >= 16:
        shapes = {(64, 128), (128, 64)}
        found += [
            replace(c, fuse_norm=False)
            for c in found
            if c.split_k == 1 and (c.block_n, c.block_k) in shapes and c.prefetch and c.num_stages == 5
        ]
    return found


def hopper_candidates(layer: Layer, m: int) -> list[LinearConfig]:
    """Tiles and splits that fill the device, with rings that leave room for the next kernel; more for 8 and 64 rows."""
    thorough = m in (8, 64)
    block_ks = (64, 128) if thorough else (128,) if m <= 32 else (64,)
    tiles = [(64, False), (128, False)]
    if 32 < m <= 64 and layer.op == "linear_add":
        tiles += [(32, True), (16, True)] if layer.n <= 2048 else [(32, True)]
    found = []
    for block_n, x_major in tiles:
        for block_k in block_ks:
            splits = hopper_splits(layer, block_n, block_k)
            for split_k in splits if thorough else splits[:1]:
                for fuse_norm in (True, False) if layer.op.startswith("norm") else (False,):
                    wide = block_n == 128 and not fuse_norm and (m > 64 or (m > 32 and split_k > 1))
                    for per_sm in (2, 3) if thorough and block_k == 64 else (2,):
                        config = hopper_config(
                            m, layer.k, block_n, block_k, split_k, fuse_norm=fuse_norm,
                            num_warps=8 if wide else 4, per_sm=per_sm, x_major=x_major,
                        )  # fmt: skip
                        found += [config] if config is not None else []
    return list(dict.fromkeys(found))


def hopper_splits(layer: Layer, block_n: int, block_k: int) -> list[int]:
    """Ways to split the columns that give the device enough to do, but not too many sums to add up."""
    tiles = math.ceil(layer.n / block_n)
    sound = [
        split
        for split in (1, 2, 4, 8)
        if split == 1
        or (tiles * split <= 300 and layer.k // split >= 256 and layer.k % (split * block_k) == 0)
    ]
    return [split for split in sound if tiles * split >= 90][:2] or sound[-1:]


def present_choice(layer: Layer, m: int) -> LinearConfig:
    """What the layer would be computed with."""
    return choose(m, layer.n, layer.k, torch.bfloat16, traits(DEVICE), layer.op)


def candidates(layer: Layer, m: int, kinds: frozenset[str]) -> list[LinearConfig]:
    """All of these kinds that may be worth timing for `m` rows, after cuBLAS and what is chosen at present."""
    found = [CUBLAS, present_choice(layer, m)]
    if "vector" in kinds and m <= 8:
        found += vector_candidates(layer, m)
    if "skinny" in kinds and m >= 4:
        skinny = skinny_candidates(layer, m)
        found += skinny if m > 4 else [c for c in skinny if c.block_n == 64 and c.num_stages >= 5]
    if "hopper" in kinds and m >= 4 and has_hopper_kernel(traits(DEVICE)):
        found += hopper_candidates(layer, m)
    return list(dict.fromkeys(found))


def label(config: LinearConfig) -> str:
    """A short name, such as skinny-64x128/2 w4 s5 p2048."""
    if config.kind == "cublas":
        return "cublas"
    text = f"{config.kind}-{config.block_n}x{config.block_k}/{config.split_k} w{config.num_warps}"
    if config.kind == "hopper":
        text += f" s{config.num_stages}+{config.x_stages}" + (" x-tall" if config.x_major else "")
    else:
        text += f" s{config.num_stages} m{config.block_m}" if config.kind == "skinny" else ""
        text += f" p{config.prefetch}"
    return text + ("" if config.fuse_norm else " own-norm")
