"""The client types errors by their text, for want of a code; here the texts come from those who write them."""

import json

import numpy as np
import pytest
from charonia.errors import CharoniaError, ErrorCode
from charonia.errors import InvalidRequestError as CharoniaInvalidRequestError
from charonia.triton.inputs import RawRequest, parse_request
from charonia.triton.live_request import LiveRequest
from charonia_client import (
    InternalServerError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
    UnsupportedError,
)
from charonia_client.errors import from_message

EXPECTED = {
    ErrorCode.INVALID_ARG: InvalidRequestError,
    ErrorCode.UNSUPPORTED: UnsupportedError,
}


def strings(*values):
    return np.array([value if isinstance(value, bytes) else value.encode() for value in values], np.object_)


def sampling(**values):
    return {"text_input": strings("hi"), "sampling_parameters": strings(json.dumps(values))}


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"text_input": strings("a", "b")},
        {"text_input": strings(b"\xff")},
        {"text_input": strings("a"), "input_ids": np.array([1], np.int32)},
        {"input_ids": np.array([[1]], np.int32)},
        {"messages": strings("{")},
        {"messages": strings("3")},
        {"messages": strings("[]")},
        {"messages": strings('{"messages": [{"role": "user"}], "tool_choice": "required"}')},
        {"messages": strings('{"messages": [{"role": "user"}], "nope": 1}')},
        {"text_input": strings("a"), "stream": np.array([1], np.int32)},
        {
            "text_input": strings("a"),
            "stream": np.array([True]),
            "exclude_input_in_output": np.array([False]),
        },
        {"input_ids": np.array([1], np.int32), "exclude_input_in_output": np.array([False])},
        {"text_input": strings("a"), "image": strings("a")},
        {"embedding_request": strings("{}")},
        {"text_input": strings("a"), "sampling_parameters": strings("[1]")},
        {"text_input": strings("a"), "sampling_parameters": strings("{")},
        sampling(unknown=1),
        sampling(temperature="warm"),
        sampling(temperature=-1),
        sampling(top_p=0),
        sampling(max_tokens=0),
        sampling(stop=[""]),
        sampling(logit_bias={"1": 1000}),
        sampling(lora_name="x"),
        sampling(guided_decoding="{}"),
        sampling(priority="high"),
        sampling(cache_salt=1),
    ],
)
def test_what_the_model_refuses_gets_its_type(inputs):
    with pytest.raises(CharoniaError) as refused:
        parse_request(RawRequest(inputs))
    error = from_message(str(refused.value), url="u", model="llm")
    assert type(error) is EXPECTED[refused.value.code], str(refused.value)
    assert str(refused.value) in str(error)


def test_a_text_that_nobody_knows_is_not_guessed_at():
    assert type(from_message("out of cheese", url="u", model="llm")) is RequestFailedError


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[INVALID_ARG] out of cheese", InvalidRequestError),
        ("[INTERNAL] out of cheese", InternalServerError),
        ("[INVALID_ARG] the model is not ready for this", InvalidRequestError),
        ("[UNAVAILABLE] out of cheese", ModelNotReadyError),
        (
            "[UNAVAILABLE] structured outputs are not available: the compiler does not start",
            ModelNotReadyError,
        ),
        ("[UNAVAILABLE] 9 requests are waiting already; try again later", QueueFullError),
        ("[CANCELLED] deadline exceeded", RequestTimeoutError),
    ],
)
def test_a_code_in_front_decides(text, kind):
    error = from_message(text, url="u", model="llm")
    assert type(error) is kind
    assert error.message == text.partition("] ")[2]


def test_the_code_comes_in_front_where_the_request_asks_for_it():
    raw = RawRequest({}, parameters='{"charonia_error_codes": "true"}')
    live = LiveRequest(sender=None, wake=lambda request: None)
    error = CharoniaInvalidRequestError("no cheese")
    assert not RawRequest({}).wants_error_codes
    assert live.error_text(error) == "no cheese"
    live.wants_error_codes = raw.wants_error_codes
    assert live.error_text(error) == "[INVALID_ARG] no cheese"
    assert (
        parse_request(
            RawRequest({"text_input": strings("a")}, parameters='{"charonia_error_codes": "true"}')
        ).generation.prompt
        == "a"
    )
