"""What a frontend makes of a request before the engine gets it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from charonia.config import EngineConfig
from charonia.errors import InvalidRequestError
from charonia.model_config import ModelConfig
from charonia.sampling_params import SamplingParams
from charonia.serving.input_processor import MAX_PROMPT_LOGPROBS, InputProcessor
from charonia.serving.request import GenerationRequest
from support.engines import tiny_model_dir


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> InputProcessor:
    folder: Path = tiny_model_dir(tmp_path_factory.mktemp("tiny"))
    model = ModelConfig.from_dir(folder)
    return InputProcessor(EngineConfig(model=str(folder), max_model_len=1 << 17), model, None)


def request(prompt: list[int], **params: int) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, params=SamplingParams(**params))


def test_the_prompt_is_scored_once_for_all_sequences(inputs: InputProcessor) -> None:
    asked = request([1, 2, 3], n=3, prompt_logprobs=4, logprobs=2, seed=7)
    first, *others = inputs.expand(asked, [1, 2, 3], first_id=10)
    assert first.sampling == asked.params
    assert len(others) == 2
    for other in others:
        assert other.sampling == msgspec.structs.replace(asked.params, prompt_logprobs=None)
    assert [first.seed, *(other.seed for other in others)] == [7, 8, 9]


def test_log_probabilities_of_a_prompt_are_bounded(inputs: InputProcessor) -> None:
    alternatives = 15
    most = MAX_PROMPT_LOGPROBS // (alternatives + 1)
    inputs.expand(request([], prompt_logprobs=alternatives), [1] * most)
    with pytest.raises(
        InvalidRequestError, match=r"'prompt_logprobs': 65537 tokens with 15 alternatives are more"
    ):
        inputs.expand(request([], prompt_logprobs=alternatives), [1] * (most + 1))
    inputs.expand(request([]), [1] * (most + 1))


@pytest.mark.parametrize(
    ("params", "is_left"),
    [
        ({"allowed_token_ids": [5]}, True),
        ({"allowed_token_ids": [5], "stop_token_ids": [5]}, True),
        ({"allowed_token_ids": [5, 6], "stop_token_ids": [5], "min_tokens": 1}, True),
        ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, False),
    ],
)
def test_some_token_must_be_left_to_draw(
    inputs: InputProcessor, params: dict[str, Any], is_left: bool
) -> None:
    asked = GenerationRequest(prompt=[1], params=SamplingParams(**params))
    if is_left:
        inputs.expand(asked, [1])
        return
    with pytest.raises(InvalidRequestError, match="'allowed_token_ids' leaves no token"):
        inputs.expand(asked, [1])
