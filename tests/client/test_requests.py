"""From keywords to the model's inputs."""

import json

import numpy as np
import pytest
from charonia_client.errors import InvalidRequestError
from charonia_client.requests import chat_request, text_request


def build(prompt="hi", token_ids=None, stream=False, **options):
    return text_request(prompt, token_ids, options, stream=stream, url="u")


def sampling(request):
    return json.loads(request.inputs["sampling_parameters"])


def test_defaults_send_only_what_every_result_needs():
    request = build()
    assert request.inputs == {
        "text_input": "hi",
        "stream": False,
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    assert (request.model, request.model_version, request.timeout) == ("llm", "", None)


def test_request_ids_are_unique_unless_given():
    assert build().request_id != build().request_id
    assert build(request_id="mine").request_id == "mine"


def test_sampling_keywords_win_over_the_mapping_and_pass_through_unchecked():
    request = build(
        sampling_params={"max_tokens": 5, "new_in_server": [1]}, max_tokens=9, stop=["x"], top_p=2.0
    )
    assert sampling(request) == {"max_tokens": 9, "new_in_server": [1], "stop": ["x"], "top_p": 2.0}


def test_logprobs_are_asked_for_when_sampling_wants_them():
    assert build(logprobs=0).inputs["return_logprobs"] is True
    assert "return_logprobs" not in build(sampling_params={"logprobs": None}).inputs


def test_options_reach_their_inputs():
    request = build(
        echo=True, return_token_ids=True, return_timings=True, return_cumulative_logprob=False, model="m"
    )
    assert request.inputs["exclude_input_in_output"] is False
    assert request.inputs["return_token_ids"] is True
    assert request.inputs["return_timings"] is True
    assert "return_cumulative_logprob" not in request.inputs
    assert request.model == "m"
    assert "sampling_parameters" not in request.inputs


def test_token_ids_may_come_from_numpy():
    assert build(None, token_ids=np.array([1, 2], np.int64)).inputs["input_ids"] == (1, 2)


def test_chat_carries_messages_and_template_arguments():
    messages = [{"role": "user", "content": "é"}]
    tools = [{"type": "function"}]
    options = {"tools": tools, "continue_final_message": True, "max_tokens": 3}
    request = chat_request(messages, options, stream=True, url="u")
    expected = {"messages": messages, "tools": tools, "continue_final_message": True}
    assert json.loads(request.inputs["messages"]) == expected
    assert sampling(request) == {"max_tokens": 3}
    assert request.inputs["stream"] is True
    assert "text_input" not in request.inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "either prompt or token_ids"),
        ({"token_ids": [1]}, "either prompt or token_ids"),
        ({"prompt": b"bytes"}, "must be a string, got bytes"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"prompt": None, "token_ids": [1, 2.5]}, "list of integers"),
        ({"prompt": None, "token_ids": [2**31]}, "31-bit"),
        ({"prompt": None, "token_ids": [-1]}, "31-bit"),
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"temperature": float("nan")}, "must be JSON"),
        ({"logit_bias": {1: object()}}, "must be JSON"),
    ],
)
def test_refuses_what_cannot_be_sent(arguments, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        build(**arguments)
    assert caught.value.model == "llm"
    assert isinstance(caught.value, ValueError)
