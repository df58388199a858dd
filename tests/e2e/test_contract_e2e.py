"""What clients are told when they ask for what cannot be, over both protocols, by the real engine."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from support.abuse import GENERATE, STREAM, boolean, ids, message, string, text_message
from support.launch import eventually
from support.served import TINY_FLAGS, Served, serving
from tritonclient.grpc import service_pb2_grpc

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

LONG = {"max_tokens": 7000, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """One request runs, one waits, and that is all."""
    flags = ("--max-num-seqs=1", "--max-waiting-requests=1")
    with serving(tmp_path_factory.mktemp("narrow"), str(tiny_model), *TINY_FLAGS, *flags) as served:
        yield served


@pytest.fixture
def stub(narrow: Served) -> Iterator[Any]:
    with grpc.insecure_channel(narrow.grpc_url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def coded_error(stub: Any, request: Any) -> tuple[str, str]:
    """Code and text of the error that ends a request.

    gRPC's own codes are left to `tests/server/test_adapter_requests.py`: a client that asks for them may crash a server
    of release 24.10.
    """
    request.parameters["charonia_error_codes"].bool_param = True
    *_, last = stub.ModelStreamInfer(iter([request]), timeout=60)
    found = re.fullmatch(r"\[(\w+)\] (.*)", last.error_message, re.DOTALL)
    assert found is not None, last
    return found[1], found[2]


def grpc_text(stub: Any, request: Any) -> str:
    """The error text within the stream, as clients get it that do not ask for codes."""
    (answer,) = stub.ModelStreamInfer(iter([request]), timeout=60)
    return str(answer.error_message)


WRONG_PARAMS = {
    '{"max_tokens": -1}': "sampling parameter 'max_tokens' must be at least 1, got -1",
    '{"temperature": "hot"}': "sampling parameter 'temperature' must be a number, got 'hot'",
    '{"top_p": 2}': "sampling parameter 'top_p' must be in (0, 1], got 2",
    '{"nonsense": 1}': "unknown sampling parameter 'nonsense'; known parameters: ",
    '{"stop_token_ids": [49152]}': "sampling parameter 'stop_token_ids': 49152 is not in the vocabulary (0 to 49151)",
    "[1]": "input 'sampling_parameters': must be a JSON object",
    "{": "input 'sampling_parameters': not valid JSON",
}


@pytest.mark.parametrize("params", WRONG_PARAMS)
def test_wrong_parameters(narrow: Served, stub: Any, params: str) -> None:
    expected = WRONG_PARAMS[params]
    code, text = coded_error(stub, text_message("Hello", params))
    assert code == "INVALID_ARG" and expected in text
    assert expected in grpc_text(stub, text_message("Hello", params))
    response = httpx.post(
        narrow.http_url + GENERATE, json={"text_input": "Hello", "sampling_parameters": params}
    )
    assert response.status_code == 400 and expected in response.json()["error"]


@pytest.mark.parametrize(
    ("request_message", "code", "text"),
    [
        (message({"stream": boolean(True)}), "INVALID_ARG", "one of the inputs 'text_input', 'input_ids'"),
        (text_message(b"\xff"), "INVALID_ARG", "input 'text_input' is not valid UTF-8 at byte 0"),
        (text_message(""), "INVALID_ARG", "the prompt is empty"),
        (message({"input_ids": ids([49152])}), "INVALID_ARG", "49152 is not in the vocabulary"),
        (message({"embedding_request": string('{"input": [49152]}')}), "INVALID_ARG", "not in the vocabulary"),
        (message({"embedding_request": string('{"input": ["a", "b"]}')}), "INVALID_ARG", "must be one text"),
        (message({"text_input": string("x"), "image": string("")}), "UNSUPPORTED", "'image' is not supported"),
        (text_message("x", {"lora_name": "a"}), "UNSUPPORTED", "'lora_name' is not supported"),
        (text_message("x", {"guided_decoding": {"json": 5}}), "INVALID_ARG", "'json' must be a JSON schema"),
        (text_message("x", {"structured_outputs": {"regex": "(a"}}), "INVALID_ARG", "cannot be compiled"),
        # A seven is all that may come, and never two of them: the engine finds out in the middle.
        (text_message("x", {"allowed_token_ids": [39], "bad_words": ["77"]}), "INVALID_ARG", "leaves none"),
        (
            message({"text_input": string("x"), "stream": boolean(True), "exclude_input_in_output": boolean(False)}),
            "INVALID_ARG",
            "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed.",
        ),
    ],
)  # fmt: skip
def test_wrong_requests(stub: Any, request_message: Any, code: str, text: str) -> None:
    got_code, got_text = coded_error(stub, request_message)
    assert (got_code, text in got_text) == (code, True), got_text


def test_long_prompts(narrow: Served, stub: Any) -> None:
    text = "the prompt has 8192 tokens, which leaves no room to generate within the context length of 8192"
    request = message({"input_ids": ids([7] * 8192), "stream": boolean(True)})
    code, told = coded_error(stub, request)
    assert code == "INVALID_ARG" and text in told
    body = {"text_input": "a" * 2_000_000, "stream": True}
    events = httpx.post(narrow.http_url + STREAM, json=body, timeout=60)
    assert (
        "the prompt has 2000000 characters, more than the context length of 8192 tokens can hold"
        in events.text
    )


def test_the_last_token_of_the_context(narrow: Served) -> None:
    inputs = {"input_ids": [7] * 8190, "max_tokens": 50, "ignore_eos": True, "return_finish_reason": True,
              "return_num_output_tokens": True, "return_num_input_tokens": True}  # fmt: skip
    answer = httpx.post(narrow.http_url + GENERATE, json=inputs, timeout=120).json()
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (8190, 2)
    assert answer["finish_reason"] == "length"


def test_a_full_queue_refuses_at_once(narrow: Served, stub: Any) -> None:
    calls = [stub.ModelStreamInfer(iter([text_message("Hello", LONG)]))]
    try:
        assert not next(calls[0]).error_message
        calls.append(stub.ModelStreamInfer(iter([text_message("Hello", LONG)])))
        assert eventually(lambda: narrow.metrics()["charonia_requests_waiting"] == 1, 60)
        started = time.monotonic()
        code, text = coded_error(stub, text_message("Hello"))
        assert code == "UNAVAILABLE" and "queue is full" in text
        response = httpx.post(narrow.http_url + GENERATE, json={"text_input": "Hello"})
        assert "queue is full" in response.json()["error"]
        assert time.monotonic() - started < 5.0
    finally:
        for call in calls:
            call.cancel()
    narrow.wait_idle()
    assert narrow.is_serving()


@pytest.mark.parametrize("place", ["parameters", "sampling_parameters"])
def test_deadline(narrow: Served, stub: Any, place: str) -> None:
    timeout = {"timeout": 200_000}
    request = (
        text_message("Hello", LONG, parameters=timeout)
        if place == "parameters"
        else text_message("Hello", LONG | timeout)
    )
    *answers, last = stub.ModelStreamInfer(iter([request]), timeout=60)
    assert answers and "deadline" in last.error_message
    narrow.wait_idle()


def test_errors_while_streaming_over_http(narrow: Served) -> None:
    body = {"text_input": "Hello", "stream": True, **LONG, "timeout": 200_000}
    events = httpx.post(narrow.http_url + STREAM, json=body, timeout=60).text.split("\n\n")
    *contents, last = [json.loads(event.removeprefix("data: ")) for event in events if event]
    assert contents and all("text_output" in content for content in contents)
    assert "deadline" in last["error"]


def test_outcomes_are_counted(narrow: Served) -> None:
    before = narrow.metrics()

    def grown(name: str) -> float:
        return narrow.metrics().get(name, 0.0) - before.get(name, 0.0)

    generate = narrow.http_url + GENERATE
    httpx.post(generate, json={"text_input": "Hello", "max_tokens": 3, "ignore_eos": True}, timeout=60)
    httpx.post(generate, json={"text_input": "Hello", "max_tokens": -3}, timeout=60)
    httpx.post(generate, json={"text_input": "Hello", "image": "x"}, timeout=60)
    assert eventually(
        lambda: (
            (
                grown('charonia_requests_total{outcome="length"}'),
                grown('charonia_requests_refused_total{code="INVALID_ARG"}'),
                grown('charonia_requests_refused_total{code="UNSUPPORTED"}'),
                grown("charonia_generation_tokens_total"),
                grown("charonia_request_seconds_count"),
            )
            == (1, 1, 1, 3, 1)
        )
    ), narrow.metrics()


def test_outputs_of_a_prescribed_form(narrow: Served) -> None:
    body = {"text_input": "Hello", "guided_regex": r"\d\d-\d\d", "exclude_input_in_output": True}
    response = httpx.post(narrow.http_url + GENERATE, json=body, timeout=60)
    assert re.fullmatch(r"\d\d-\d\d", response.json()["text_output"])
    events = httpx.post(narrow.http_url + STREAM, json={**body, "stream": True}, timeout=60)
    pieces = [
        json.loads(line[6:])["text_output"] for line in events.text.splitlines() if line.startswith("data: ")
    ]
    assert re.fullmatch(r"\d\d-\d\d", "".join(pieces))
