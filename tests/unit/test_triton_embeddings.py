"""Embedding requests of Triton's vLLM backend, and what its clients read from the answer."""

import json
from typing import Any

import numpy as np
import pytest
from charonia.errors import CharoniaError, ErrorCode
from charonia.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestTimings
from charonia.pooling_params import PoolingParams
from charonia.serving.request import EmbeddingRequest
from charonia.triton.contract import MAX_JSON_BYTES
from charonia.triton.embedding_outputs import EmbeddingAssembler
from charonia.triton.inputs import ParsedRequest, RawRequest, parse_request
from support.fake_pb import Request, flag, text


def parse(inputs: dict[str, Any], parameters: dict[str, Any] | None = None) -> ParsedRequest:
    return parse_request(RawRequest.take(Request(inputs, json.dumps(parameters or {}), "r1", 0)))


def embedding(**values: Any) -> dict[str, Any]:
    return {"embedding_request": text(json.dumps(values))}


def test_what_the_openai_frontend_sends() -> None:
    counts = {"return_num_input_tokens": flag(True), "return_num_output_tokens": flag(True)}
    parsed = parse(embedding(input="hello", pooling_params={"dimensions": [64]}) | counts)
    request = parsed.generation
    assert isinstance(request, EmbeddingRequest)
    assert (request.prompt, request.params) == ("hello", PoolingParams(dimensions=64))
    assert request.request_id == "r1"
    assert parsed.options.outputs == {"num_input_tokens", "num_output_tokens"}


def test_token_ids_beside_an_empty_text_and_request_parameters() -> None:
    inputs = embedding(input=[101, 7592, 102], pooling_params={}) | {
        "text_input": text(b""),
        "stream": flag(True),
    }
    parsed = parse(inputs, {"priority": 3, "timeout": 5_000_000, "cache_salt": "me"})
    request = parsed.generation
    assert isinstance(request, EmbeddingRequest)
    assert request.prompt == [101, 7592, 102]
    assert (request.priority, request.timeout_s, request.cache_salt) == (3, 5.0, "me")
    assert not parsed.options.stream


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"embedding_request": text("{")}, "input 'embedding_request': not valid JSON"),
        ({"embedding_request": text("[]")}, "input 'embedding_request': must be a JSON object"),
        ({"embedding_request": text("[" * 100_000)}, "nested too deeply"),
        ({"embedding_request": text(b" " * (MAX_JSON_BYTES + 1))}, "bytes; at most"),
        ({"embedding_request": np.array([1], np.int32)}, "'embedding_request' must be one string"),
        (embedding(), "'input' must be one text or a non-empty list of token ids"),
        (embedding(input=[]), "'input' must be one text or a non-empty list of token ids"),
        (embedding(input=["a", "b"]), "each further text needs a request of its own"),
        (embedding(input=[1, True]), "'input' must be one text"),
        (embedding(input={"text": "a"}), "'input' must be one text"),
        (embedding(input="a", model="m"), "unknown key 'model'; known keys: input, pooling_params"),
        (embedding(input="a", pooling_params=[1]), "'pooling_params' must be an object"),
        (embedding(input="a", pooling_params={"dim": 1}), "unknown pooling parameter 'dim'"),
        (embedding(input="a") | {"text_input": text("b")}, "'text_input' and 'embedding_request' exclude"),
        (
            embedding(input="a") | {"input_ids": np.array([1], np.int32)},
            "'input_ids' and 'embedding_request' exclude",
        ),
        (embedding(input="a") | {"messages": text("[]")}, "'messages' and 'embedding_request' exclude"),
        (embedding(input="a") | {"sampling_parameters": text('{"top_k": 1}')}, "'top_k' has no meaning"),
        (embedding(input="a") | {"return_logprobs": flag(True)}, "has no output 'logprobs'"),
    ],
)
def test_the_fault_is_named(inputs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CharoniaError) as refused:
        parse(inputs)
    assert refused.value.code is ErrorCode.INVALID_ARG
    assert complaint in str(refused.value)


def test_the_answer() -> None:
    returns = ("num_input_tokens", "num_output_tokens", "finish_reason", "timings")
    flags = {f"return_{name}": flag(True) for name in returns}
    assembler = EmbeddingAssembler(parse(embedding(input="a") | flags).options)
    assert not assembler.finished
    values = np.array([0.1, -1.0, 0.0], np.float32)
    assembler.add(
        EmbeddingRequestOutput(
            request_id="r1",
            outputs=EmbeddingOutput(values.tolist()),
            prompt_token_ids=[5, 6],
            timings=RequestTimings(queue=0.5, first_token=2.0, total=2.0),
        )
    )
    assert assembler.finished
    arrays = assembler.take()
    numbers = json.loads(arrays["text_output"][0])
    assert all(isinstance(number, float) for number in numbers)
    assert np.array_equal(np.array(numbers, np.float32), values)
    assert arrays["num_input_tokens"].tolist() == [2] and arrays["num_input_tokens"].dtype == np.uint32
    assert arrays["num_output_tokens"].tolist() == [0] and arrays["num_output_tokens"].dtype == np.uint32
    assert arrays["finish_reason"].tolist() == [b"stop"]
    assert json.loads(arrays["timings"][0])["total_s"] == 2.0
