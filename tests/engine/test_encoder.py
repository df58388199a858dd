"""Encoders: hidden states and embeddings of transformers' BERT, and what such a model refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from charonia import LLM, PoolingParams
from charonia.errors import ConfigError, InvalidRequestError, ModelLoadError, UnsupportedError
from support.tiny_models import tiny_bert

SETTINGS = {"skip_tokenizer_init": True, "cpu_threads": 1, "max_num_seqs": 4}
LENGTHS = (1, 3, 96, 40, 17, 96, 2)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llm(bert_dir: Path) -> Iterator[LLM]:
    """Steps of at most 128 tokens: two of the long prompts never share one."""
    with LLM(str(bert_dir), max_num_batched_tokens=128, **SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def states() -> list[torch.Tensor]:
    model = tiny_bert()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts()]


def vectors(llm: LLM, **params: Any) -> torch.Tensor:
    outputs = llm.embed(prompts(), PoolingParams(**params), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts()
    return torch.tensor([output.outputs.embedding for output in outputs])


def test_hidden_states_are_those_of_transformers(llm: LLM, states: list[torch.Tensor]) -> None:
    for kind, wanted in (
        ("cls", torch.stack([item[0] for item in states])),
        ("mean", torch.stack([item.mean(dim=0) for item in states])),
        ("last", torch.stack([item[-1] for item in states])),
    ):
        found = vectors(llm, pooling_type=kind, normalize=False)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    stats = llm.stats()
    assert (stats.num_running, stats.kv_blocks_used, stats.generated_tokens) == (0, 0, 0)


def test_a_model_that_says_nothing_pools_its_first_token(llm: LLM, states: list[torch.Tensor]) -> None:
    wanted = torch.nn.functional.normalize(torch.stack([item[0] for item in states]), dim=-1)
    torch.testing.assert_close(vectors(llm), wanted, atol=1e-5, rtol=1e-5)


def test_what_an_encoder_refuses(llm: LLM, bert_dir: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"an encoder \(BertModel\): it makes embeddings"):
        llm.generate([[5, 6]], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="97 tokens, more than the context length of 96"):
        llm.embed([[5] * 97], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="320 is not in the vocabulary"):
        llm.embed([[320]], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="'dimensions' must be from 1 to 64"):
        llm.embed([[5]], PoolingParams(dimensions=65), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 entries for 1 prompts"):
        llm.embed([[5]], [PoolingParams()] * 2, use_tqdm=False)
    with pytest.raises(ConfigError, match="must be at least max_model_len"):
        LLM(str(bert_dir), max_num_batched_tokens=95, **SETTINGS)


def sentence_model(directory: Path, *modules: str, pooling: str = "mean_tokens", **config: Any) -> Path:
    """`tiny_bert` with the files that sentence-transformers writes beside it."""
    tiny_bert().save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    names = ["Transformer", *modules]
    kinds = [
        {"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"}
        for i, name in enumerate(names)
    ]
    kinds[0]["path"] = ""
    (directory / "modules.json").write_text(json.dumps(kinds))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, f"pooling_mode_{pooling}": True}
        )
    )
    return directory


def test_a_sentence_transformers_checkpoint(tmp_path: Path, states: list[torch.Tensor]) -> None:
    with LLM(str(sentence_model(tmp_path, "Pooling", matryoshka_dimensions=[16, 32])), **SETTINGS) as llm:
        (output,) = llm.embed([prompts()[3]], use_tqdm=False)
        wanted = states[3].mean(dim=0)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, atol=1e-5, rtol=1e-5)
        (output,) = llm.embed([prompts()[3]], PoolingParams(dimensions=16), use_tqdm=False)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted[:16], atol=1e-5, rtol=1e-5)
        with pytest.raises(InvalidRequestError, match="must be one of 16, 32"):
            llm.embed([[5]], PoolingParams(dimensions=17), use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="context length of 40"):
            llm.embed([[5] * 41], use_tqdm=False)


@pytest.mark.parametrize(
    ("modules", "pooling", "config", "complaint"),
    [
        (("Pooling", "Dense"), "mean_tokens", {}, "type 'Dense' are not supported"),
        (("Pooling",), "max_tokens", {}, "pooling_mode_max_tokens: exactly one of"),
        (
            ("Pooling",),
            "mean_tokens",
            {"position_embedding_type": "relative_key"},
            "'relative_key' is not supported",
        ),
        (("Pooling",), "mean_tokens", {"is_decoder": True}, "'is_decoder' is not supported"),
        (("Pooling",), "mean_tokens", {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        (("Pooling",), "mean_tokens", {"matryoshka_dimensions": [0]}, "list of positive integers"),
    ],
)
def test_checkpoints_that_would_be_another_model(
    tmp_path: Path, modules: tuple[str, ...], pooling: str, config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        LLM(str(sentence_model(tmp_path, *modules, pooling=pooling, **config)), **SETTINGS)
