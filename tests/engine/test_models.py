"""Every architecture against transformers: same logits, same greedy tokens, through real paged caches."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from charonia.config import EngineConfig
from charonia.model_config import SUPPORTED_ARCHITECTURES, ModelConfig
from charonia.models import LoadedModel, load_model, resolve_dtype
from charonia.models.registry import ARCHITECTURES, ENCODERS
from support.paged_context import PagedContext, Sequence, greedy
from support.tiny_models import TINY_MODELS, save_tiny_model, tiny_model
from transformers import PreTrainedModel
from transformers.models.gemma3 import modeling_gemma3

CPU = torch.device("cpu")
PROMPT_LENGTHS = (1, 5, 23, 40)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share between threads, which would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LoadedModel:
    config = ModelConfig.from_dir(directory)
    return load_model(EngineConfig(model=str(directory), **settings), config, device=CPU, dtype=dtype)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def reference_greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def chunked_logits(loaded: LoadedModel, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    context = PagedContext(loaded.config, 3 + len(tokens) // 8, loaded.model.embed_tokens.weight.dtype)
    sequence = Sequence(tokens, [])
    return torch.cat([context.step(loaded.model, [(sequence, count)]) for count in chunks])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_and_greedy_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    reference = tiny_model(name)
    loaded = load(save_tiny_model(name, tmp_path))
    tokens = prompts()[-1]
    # Chunks that end inside and at the end of a block, then single tokens as in decoding.
    chunks = [13, 3, 17, 1, 1, 1, 1, 1, 1, 1]
    logits = chunked_logits(loaded, tokens, chunks)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)
    expected = [reference_greedy(reference, prompt, 12) for prompt in prompts()]
    assert greedy(loaded.model, loaded.config, prompts(), 12, chunk=9) == expected
    assert greedy(loaded.model, loaded.config, prompts(), 12) == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_bf16_logits_follow_fp32(name: str, tmp_path: Path) -> None:
    """Bound by what transformers itself loses by going to bf16."""
    reference = tiny_model(name)
    loaded = load(save_tiny_model(name, tmp_path), torch.bfloat16)
    tokens = prompts()[-1]
    exact = reference_logits(reference, tokens)
    theirs = (reference_logits(reference.to(torch.bfloat16), tokens).float() - exact).abs()
    ours = (chunked_logits(loaded, tokens, [len(tokens)]).float() - exact).abs()
    assert ours.mean() <= 1.5 * theirs.mean()


def test_gemma3_attention_soft_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the cap and then leaves it out; its attention function does take one."""
    reference = tiny_model("gemma3")
    reference.set_attn_implementation("eager")
    eager = functools.partial(modeling_gemma3.eager_attention_forward, softcap=0.5)
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", eager)
    directory = edit_config(save_tiny_model("gemma3", tmp_path), attn_logit_softcapping=0.5)
    tokens = prompts()[-1]
    logits = chunked_logits(load(directory), tokens, [len(tokens)])
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


def edit_config(directory: Path, *without: str, **changes: Any) -> Path:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))
    return directory


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("llama", {"rope_theta": 10000.0}),
        ("llama-rope-linear", {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        (
            "llama-rope-yarn",
            {
                "rope_theta": 10000,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            },
        ),
        (
            "gemma3-rope-linear",
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
            },
        ),
    ],
)
def test_older_config_form_means_the_same(name: str, older: dict[str, Any], tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path)
    newer = ModelConfig.from_dir(directory)
    edit_config(directory, "rope_parameters", "layer_types", **older)
    assert ModelConfig.from_dir(directory) == newer


def test_layers_share_one_rotary_table_per_rope(tmp_path: Path) -> None:
    loaded = load(save_tiny_model("gemma3", tmp_path), max_model_len=100)
    tables = [layer.attention.cos_sin_cache for layer in loaded.model.layers]
    assert tables[0] is tables[1] is tables[3]
    assert tables[0] is not tables[2]
    assert tables[0].shape == (100, 16)
    assert tables[0].dtype == torch.float32


def test_num_bytes_counts_a_tied_head_once(tmp_path: Path) -> None:
    loaded = load(save_tiny_model("llama-mha-tied", tmp_path), torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in tiny_model("llama-mha-tied").parameters())
    assert loaded.num_bytes == 2 * parameters + 4 * 512 * 16


def test_registry_builds_what_the_config_accepts() -> None:
    assert (*ARCHITECTURES, *ENCODERS) == SUPPORTED_ARCHITECTURES


@pytest.mark.parametrize(
    ("setting", "stated", "device", "expected"),
    [
        ("float16", "bfloat16", "cpu", torch.float16),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("auto", "float16", "cpu", torch.bfloat16),
        ("auto", "float16", "cuda", torch.float16),
        ("auto", None, "cpu", torch.float32),
    ],
)
def test_resolve_dtype(setting: Any, stated: Any, device: str, expected: torch.dtype, tmp_path: Path) -> None:
    directory = edit_config(save_tiny_model("llama", tmp_path), dtype=stated)
    engine = EngineConfig(model=str(directory), dtype=setting)
    assert resolve_dtype(engine, ModelConfig.from_dir(directory), torch.device(device)) == expected
