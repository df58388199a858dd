"""What a frontend answers without the engine."""

from typing import Any

import pytest
from charonia.config import EngineConfig
from charonia.entrypoints.default_model import ensure_default_model
from charonia.errors import InvalidRequestError
from charonia.model_config import ModelConfig
from charonia.serving import utility
from charonia.serving.input_processor import InputProcessor
from charonia.serving.utility import answer_utility
from support.text_tokenizers import smollm2

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def inputs() -> InputProcessor:
    folder = ensure_default_model()
    config = EngineConfig(model=str(folder), max_model_len=64)
    return InputProcessor(config, ModelConfig.from_dir(folder), smollm2())


def test_a_text(inputs: InputProcessor) -> None:
    answer = answer_utility(inputs, {"tokenize": {"prompt": "Hello there", "return_token_strs": True}})
    assert answer["tokens"] == smollm2().encode("Hello there")
    assert answer["token_strs"] == ["Hello", "Ġthere"]
    assert answer["max_model_len"] == 64
    assert answer_utility(inputs, {"detokenize": {"tokens": answer["tokens"]}}) == {"prompt": "Hello there"}
    for body in ({"tokenize": {"prompt": "Hello there"}}, {"detokenize": {"tokens": answer["tokens"]}}):
        ((kind, asked),) = body.items()
        texts = answer_utility(inputs, {kind: {**asked, "return_token_texts": True}})["token_texts"]
        assert texts == ["Hello", " there"]


def test_a_chat_goes_through_the_template(inputs: InputProcessor) -> None:
    body: dict[str, Any] = {"messages": HELLO}
    opened = answer_utility(inputs, {"tokenize": body})
    assert opened["prompt"].endswith("<|im_start|>assistant\n")
    closed = answer_utility(inputs, {"tokenize": {**body, "add_generation_prompt": False}})
    assert closed["prompt"].endswith("Hello there<|im_end|>\n")
    assert opened["tokens"][: len(closed["tokens"])] == closed["tokens"]
    # Special tokens are spelt out in both directions.
    assert answer_utility(inputs, {"detokenize": {"tokens": opened["tokens"]}})["prompt"] == opened["prompt"]


def test_the_model(inputs: InputProcessor) -> None:
    info = answer_utility(inputs, {"model_info": {}})
    assert (info["max_model_len"], info["model_type"]) == (64, "LlamaForCausalLM")
    assert "im_start" in info["chat_template"]
    assert info["recommended_sampling"] == {}


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"tokenize": {"prompt": "a"}, "model_info": {}},
        {"launch": {}},
        {"tokenize": {}},
        {"tokenize": {"prompt": "a", "messages": HELLO}},
        {"tokenize": {"prompt": 3}},
        {"tokenize": {"prompt": "a", "nope": 1}},
        {"tokenize": {"prompt": "a" * 100_000}},
        {"tokenize": {"messages": [{"role": "user"}]}},
        {"tokenize": {"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}}},
        {"detokenize": {"tokens": [-1]}},
        {"detokenize": {"tokens": [49152]}},
        {"detokenize": {"tokens": ["a"]}},
        {"detokenize": {"tokens": [0] * 11}},
        {"model_info": {"x": 1}},
        {"model_info": 3},
    ],
)
def test_what_is_refused(
    inputs: InputProcessor, request_body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility, "MAX_TOKENS", 10)
    with pytest.raises(InvalidRequestError):
        answer_utility(inputs, request_body)
