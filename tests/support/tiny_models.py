"""Tiny random checkpoints of every supported architecture, written by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def _mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**SIZES, **changes}))


def _qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes}))


def _qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **changes}))


def _gemma3(**changes: Any) -> PreTrainedModel:
    base = {**SIZES, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**base, "layer_types": GEMMA_LAYERS, **changes}))


GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

TINY_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-mha-tied": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-mqa-biases": lambda: _llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: _llama(
        head_dim=32, num_attention_heads=3, num_key_value_heads=1, hidden_size=48
    ),
    "llama-rope-linear": lambda: _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 3.0}
    ),
    "llama-rope-llama3": lambda: _llama(rope_parameters=LLAMA3),
    "llama-rope-yarn": lambda: _llama(rope_parameters=YARN),
    "llama-rope-yarn-untruncated": lambda: _llama(
        rope_parameters={**YARN, "truncate": False, "beta_fast": 20.0, "mscale": 0.7, "mscale_all_dim": 1.3}
    ),
    "mistral-window": lambda: _mistral(sliding_window=11),
    "mistral-no-window": lambda: _mistral(sliding_window=None, head_dim=24),
    "qwen2": _qwen2,
    "qwen2-window-tied": lambda: _qwen2(
        use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2-layer-types": lambda: _qwen2(
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": _qwen3,
    "qwen3-biases-yarn": lambda: _qwen3(attention_bias=True, rope_parameters=YARN, head_dim=32),
    "qwen3-window": lambda: _qwen3(use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "gemma3": _gemma3,
    "gemma3-caps-untied": lambda: _gemma3(
        final_logit_softcapping=3.0, tie_word_embeddings=False, head_dim=32, attention_bias=True
    ),
    "gemma3-rope-linear": lambda: _gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    ),
}
"""By name: architecture first, then what is special."""


def tiny_model(name: str) -> PreTrainedModel:
    """The model in fp32, its weights fixed by the name; norms and biases are random too."""
    return randomised(TINY_MODELS[name], sum(name.encode()))


def tiny_bert(**changes: Any) -> PreTrainedModel:
    """An encoder of the same size, with its pooler, which embeddings have no use for."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("bos_token_id", "eos_token_id")}
    return randomised(lambda: BertModel(BertConfig(**{**sizes, "max_position_embeddings": 96, **changes})), 4)


def gpu_shaped_model(architecture: str) -> PreTrainedModel:
    """The same of sizes that the GPU's kernels know, heads of 64, with one layer of each kind."""
    shape = {"head_dim": 64, "num_hidden_layers": 1}
    make = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma3": _gemma3}[architecture]
    if architecture == "gemma3":
        shape |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    if architecture == "qwen2":
        shape = {"hidden_size": 256, "num_hidden_layers": 1}
    return randomised(lambda: make(**shape), len(architecture))


def randomised(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A model whose weights, norms and biases are random, fixed by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_tiny_model(name: str, directory: Path, **save_options: Any) -> Path:
    """Write config.json and the safetensors of `tiny_model(name)` to `directory`, and return it."""
    tiny_model(name).save_pretrained(directory, **save_options)
    return directory
