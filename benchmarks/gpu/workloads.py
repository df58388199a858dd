"""Models and workloads for runs of several engines side by side.

Fixed by seed: every engine gets the same token ids, ignores end-of-sequence tokens, decodes greedily, and is timed over
the whole batch. The order of the random draws is part of a workload: other engines' figures were taken with it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Item = tuple[list[int], int]
"""A prompt's token ids, and how many tokens to generate."""

MODELS: dict[str, dict[str, Any]] = {
    "llama8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen06b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}
"""The config.json of each model: the real shapes, for random weights."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Changes that make any of the models small enough for a trial without a GPU; the vocabulary stays."""


def token_ids(rng: random.Random, count: int) -> list[int]:
    """Random token ids that every model's vocabulary holds."""
    return [rng.randrange(10, 100000) for _ in range(count)]


def chat(count: int = 1000, seed: int = 0) -> list[Item]:
    """Lengths as in chats: log-normal prompts and outputs, of 4 to 1024 tokens."""
    rng = random.Random(seed)

    def length(mu: float, sigma: float) -> int:
        return max(4, min(1024, int(rng.lognormvariate(mu, sigma))))

    return [(token_ids(rng, length(5.0, 1.0)), length(5.0, 0.9)) for _ in range(count)]


def fixed(count: int, prompt_len: int, output_len: int, seed: int = 1) -> list[Item]:
    """Prompts of one length, outputs of one length."""
    rng = random.Random(seed)
    return [(token_ids(rng, prompt_len), output_len) for _ in range(count)]


def nano(count: int = 256, seed: int = 0) -> list[Item]:
    """Prompts and outputs of 100 to 1024 tokens, uniformly: the published benchmark of nano-vllm."""
    rng = random.Random(seed)
    return [(token_ids(rng, rng.randint(100, 1024)), rng.randint(100, 1024)) for _ in range(count)]


def shared_prefix(
    count: int = 256, prefix_len: int = 2048, tail_len: int = 128, output_len: int = 64, seed: int = 2
) -> list[Item]:
    """Prompts that begin alike."""
    rng = random.Random(seed)
    prefix = token_ids(rng, prefix_len)
    return [(prefix + token_ids(rng, tail_len), output_len) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table in the performance notes.

    peer_s, target_s: seconds of vLLM 0.24.0 on one H100, and ours to reach there. repeats: how often it runs, the best
    run counting; each time with other tokens.
    """

    label: str
    make: Callable[[], list[Item]]
    peer_s: float
    target_s: float
    repeats: int = 1


SUITES: dict[str, list[Workload]] = {
    "llama8b": [
        Workload("chat-1000", chat, 20.671, 17.0),
        Workload("1000/1000x256", lambda: fixed(256, 1000, 1000), 34.659, 30.5),
        Workload("2048/128x256", lambda: fixed(256, 2048, 128), 17.493, 16.2),
        Workload("128/256x1", lambda: fixed(1, 128, 256), 1.691, 1.40, repeats=3),
        Workload("128/256x8", lambda: fixed(8, 128, 256), 1.760, 1.45, repeats=3),
        Workload("128/256x64", lambda: fixed(64, 128, 256), 2.174, 1.80),
        Workload("16000/64x1", lambda: fixed(1, 16000, 64, seed=7), 0.919, 0.88, repeats=3),
        Workload("prefix2048+128/64x256", shared_prefix, 2.399, 1.70),
    ],
    "qwen06b": [
        Workload("nano-256", nano, 7.692, 6.5),
        Workload("chat-1000", chat, 11.036, 5.0),
        Workload("128/256x1", lambda: fixed(1, 128, 256), 0.403, 0.155, repeats=3),
        Workload("128/256x64", lambda: fixed(64, 128, 256), 0.713, 0.36),
    ],
}
