"""Automatic choices by device, and what is refused."""

from typing import Any

import pytest
import torch
from charonia.config import EngineConfig
from charonia.errors import ConfigError
from charonia.model_config import ModelConfig, parse_model_config
from charonia.worker.setup import DeviceSetup, resolve


def model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return parse_model_config({**values, **changes}, {})


def setup(device: str, **settings: Any) -> DeviceSetup:
    return resolve(EngineConfig(model="m", device=device, **settings), model())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that claims to have a GPU; nothing is allocated on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_choices_for_a_cpu(no_gpu: None) -> None:
    found = setup("auto")
    assert found.device == torch.device("cpu")
    assert (found.block_size, found.max_num_batched_tokens, found.max_model_len) == (16, 512, 4096)
    assert found.dtype == found.kv_dtype == torch.bfloat16
    assert found == setup("cpu")


def test_choices_for_a_gpu(gpu: None) -> None:
    found = setup("auto")
    assert found.device == torch.device("cuda", 0)
    assert (found.block_size, found.max_num_batched_tokens, found.max_model_len) == (64, 8192, 4096)
    assert found.dtype == found.kv_dtype == torch.bfloat16
    assert found == setup("cuda")
    assert setup("cpu").device == torch.device("cpu")


def test_a_gpu_that_is_not_there(no_gpu: None) -> None:
    with pytest.raises(ConfigError, match="'device' is 'cuda', but torch sees no CUDA device"):
        setup("cuda")


def test_block_sizes(gpu: None) -> None:
    assert [setup("cuda", block_size=size).block_size for size in (16, 32, 64, 128)] == [16, 32, 64, 128]
    assert setup("cpu", block_size=5).block_size == 5
    for size in (1, 8, 48, 256):
        with pytest.raises(
            ConfigError, match=f"'block_size' must be one of 16, 32, 64, 128 on a GPU, got {size}"
        ):
            setup("cuda", block_size=size)


def test_cache_dtypes(gpu: None) -> None:
    for name in ("fp8", "fp8_e4m3"):
        assert setup("cuda", kv_cache_dtype=name).kv_dtype == torch.float8_e4m3fn
        assert setup("cuda", kv_cache_dtype=name).dtype == torch.bfloat16
        with pytest.raises(ConfigError, match=f"'kv_cache_dtype' is '{name}', but on a CPU only 'auto'"):
            setup("cpu", kv_cache_dtype=name)
    assert setup("cuda", dtype="float32").kv_dtype == torch.float32
    assert setup("cpu", dtype="float32").kv_dtype == torch.float32


def test_most_sequences(gpu: None) -> None:
    assert setup("cuda", max_num_seqs=1024).max_num_seqs == 1024
    with pytest.raises(ConfigError, match="'max_num_seqs' must be at most 1024 on a GPU, got 1025"):
        setup("cuda", max_num_seqs=1025)
    assert setup("cpu", max_num_seqs=1025).max_num_batched_tokens == 1025


def test_the_context_length_bounds_a_sequence(no_gpu: None) -> None:
    assert setup("cpu", max_model_len=4096).max_model_len == 4096
    with pytest.raises(ConfigError, match=r"'max_model_len' \(4097\) exceeds the context length \(4096\)"):
        setup("cpu", max_model_len=4097)


def test_the_schedulers_limits(no_gpu: None) -> None:
    config = EngineConfig(model="m", max_num_seqs=8, max_num_batched_tokens=100, async_scheduling=False)
    limits = resolve(config, model()).scheduler_config(config, 33)
    assert (limits.num_blocks, limits.block_size, limits.max_num_seqs) == (33, 16, 8)
    assert (limits.max_num_batched_tokens, limits.long_prefill_token_threshold) == (100, 25)
    assert limits.lookahead == 0
    config = EngineConfig(model="m", long_prefill_token_threshold=7)
    limits = resolve(config, model()).scheduler_config(config, 33)
    assert (limits.long_prefill_token_threshold, limits.lookahead) == (7, 1)
