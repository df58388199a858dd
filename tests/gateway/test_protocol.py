"""Wrong bodies: how many faults are gathered, and which one is told."""

from typing import Any

import httpx
import pydantic
import pytest
from charonia_client.gateway.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
)

USER = {"role": "user", "content": "a"}
WORDS = ["a"] * 20_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": WORDS}),
        (CompletionRequest, {"prompt": [WORDS] * 1000}),
        (CompletionRequest, {"prompt": "a", "allowed_token_ids": WORDS}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": WORDS}),
        (CompletionRequest, {"prompt": "a", "bad_words": [1] * 20_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(20_000)), "x")}),
        (CompletionRequest, {"prompt": "a", "guided_choice": [1] * 20_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": WORDS}]}),
        (ChatRequest, {"messages": WORDS}),
        (ChatRequest, {"messages": [USER], "tools": WORDS}),
        (DetokenizeRequest, {"tokens": WORDS}),
        (EmbeddingRequest, {"input": WORDS}),
        (EmbeddingRequest, {"input": [WORDS] * 2000}),
    ],
)
def test_long_lists_of_wrong_values_are_few_faults(
    kind: type[pydantic.BaseModel], body: dict[str, Any]
) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": ["a", 1]}, "prompt.1", "valid string"),
        ({"prompt": [[1], [2, "x"]]}, "prompt.1.1", "valid integer"),
        ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({}, "prompt", "Field required"),
        ({"prompt": "a", "stop": ["a"] * 65}, "stop", "at most 64"),
        ({"prompt": "a", "stop": [1]}, "stop.0", "valid string"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0", "valid dictionary"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "Field required"),
        ({"messages": "a"}, "messages", "valid list"),
        ({"messages": [USER], "tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"messages": [USER], "tool_choice": {}}, "tool_choice.function", "Field required"),
        ({"messages": [USER], "response_format": {"type": "x"}}, "response_format.type", "'text'"),
    ],
)
def test_the_fault_that_is_told(gateway_url: str, body: dict[str, Any], param: str, message: str) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = httpx.post(gateway_url + path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ") and message in error["message"]


def test_what_is_no_json_has_no_field(gateway_url: str) -> None:
    headers = {"content-type": "application/json"}
    error = httpx.post(f"{gateway_url}/v1/completions", content="{", headers=headers).json()["error"]
    assert (error["param"], error["message"]) == (None, "JSON decode error")
