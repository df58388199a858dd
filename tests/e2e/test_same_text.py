"""One question, one answer, whichever client asks: text, token ids, reasons, counts, log-probabilities."""

import asyncio
import json
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from charonia import LLM, PoolingParams, SamplingParams
from charonia_client import AsyncCharoniaClient, CharoniaClient, GenerateResult, ResponseStream, StreamChunk
from support.answers import (
    Answer,
    Ask,
    assert_same,
    http_generate,
    http_stream,
    triton_aio,
    triton_grpc,
)
from support.launch import eventually
from support.prompts import CHATS, TEXTS
from support.served import Served

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

GREEDY = {"temperature": 0.0, "max_tokens": 16}
ASKS = {
    "one word": Ask(GREEDY, text=TEXTS["one word"]),
    "code": Ask(GREEDY, text=TEXTS["python class"]),
    "emoji": Ask(GREEDY, text=TEXTS["emoji"]),
    "chinese": Ask(GREEDY, text=TEXTS["chinese"]),
    "hindi": Ask(GREEDY, text=TEXTS["hindi"]),
    "to the end": Ask({"temperature": 0, "max_tokens": 40}, messages=CHATS["chat of several turns"]),
    "chat": Ask(GREEDY, messages=CHATS["chat with a system message"]),
    "token ids": Ask(GREEDY, token_ids=[504, 3575, 282, 4649, 314]),
    "stop string": Ask({**GREEDY, "stop": [" 8,", "never"]}, text=TEXTS["count"]),
    "log-probabilities": Ask({**GREEDY, "logprobs": 2}, text=TEXTS["capital"]),
    "two seeded sequences": Ask(
        {"temperature": 0.8, "top_p": 0.9, "seed": 7, "n": 2, "max_tokens": 12}, text=TEXTS["name"]
    ),
}


@pytest.fixture(scope="module")
def expected(real_model: Path) -> dict[str, Answer]:
    """What the offline engine says, asked one by one; its sums of log-probabilities need asking for them."""
    answers = {}
    with LLM(str(real_model), dtype="float32", max_num_seqs=4) as llm:
        for name, ask in ASKS.items():
            params = SamplingParams.from_mapping({"logprobs": 0, **ask.params})
            if ask.messages is not None:
                (output,) = llm.chat(ask.messages, params, use_tqdm=False)
            else:
                (output,) = llm.generate(ask.text or list(ask.token_ids or ()), params, use_tqdm=False)
            answer = answers[name] = Answer.of_llm(output)
            if "logprobs" not in ask.params:
                answer.logprobs = [None] * len(answer.texts)
    return answers


def assert_all_same(got: dict[str, Answer], expected: dict[str, Answer]) -> None:
    assert list(got) == list(ASKS)
    for name, answer in got.items():
        assert_same(answer, expected[name])


def test_the_questions_show_what_they_are_meant_to(expected: dict[str, Answer]) -> None:
    assert expected["stop string"].finish_reasons == ["stop"]
    assert expected["stop string"].texts == [" 6, 7,"]
    assert expected["to the end"].finish_reasons == ["stop"]
    assert expected["code"].finish_reasons == ["length"]
    assert len(set(expected["two seeded sequences"].texts)) == 2


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_tritonclient_grpc(real: Served, expected: dict[str, Answer], stream: bool) -> None:
    assert_all_same(triton_grpc(real.grpc_url, ASKS, stream=stream), expected)


async def test_tritonclient_grpc_aio(real: Served, expected: dict[str, Answer]) -> None:
    assert_all_same(await triton_aio(real.grpc_url, ASKS), expected)


def test_http_generate(real: Served, expected: dict[str, Answer]) -> None:
    assert_all_same(http_generate(real.http_url, ASKS), expected)


def test_http_generate_stream(real: Served, expected: dict[str, Answer]) -> None:
    assert_all_same(http_stream(real.http_url, ASKS), expected)


# ---- our own client ----

RETURNS = {"return_token_ids": True, "return_timings": True, "return_cumulative_logprob": True}


def of_result(result: GenerateResult) -> Answer:
    """A client's result in the common form."""
    assert result.usage is not None and result.timings is not None
    ids = [list(sequence.token_ids or ()) for sequence in result.sequences]
    assert result.usage.num_output_tokens == sum(map(len, ids))
    assert 0 < (result.timings.first_token_s or 0) <= (result.timings.total_s or 0)
    return Answer(
        [sequence.text for sequence in result.sequences],
        [str(sequence.finish_reason) for sequence in result.sequences],
        result.usage.num_input_tokens,
        ids,
        [float(sequence.cumulative_logprob or 0.0) for sequence in result.sequences],
        [
            None
            if sequence.logprobs is None
            else [
                {
                    str(token): {"logprob": e.logprob, "rank": e.rank, "decoded_token": e.decoded_token}
                    for token, e in position.items()
                }
                for position in sequence.logprobs
            ]
            for sequence in result.sequences
        ],
    )


def address(served: Served, protocol: str) -> str:
    return served.grpc_url if protocol == "grpc" else served.http_url


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_our_client(real: Served, expected: dict[str, Answer], protocol: str) -> None:
    with CharoniaClient(address(real, protocol)) as client:

        def stream(ask: Ask) -> ResponseStream:
            options = {**ask.params, **RETURNS}
            if ask.messages is not None:
                return client.chat(ask.messages, stream=True, **options)
            return client.stream(ask.text, token_ids=ask.token_ids, **options)

        streams = {name: stream(ask) for name, ask in ASKS.items()}  # all are on their way before any is read
        answers = {name: of_result(GenerateResult.from_chunks(s)) for name, s in streams.items()}
        assert_all_same(answers, expected)
        chat, text = ASKS["chat"], ASKS["log-probabilities"]
        assert_same(of_result(client.chat(chat.messages, **chat.params, **RETURNS)), expected["chat"])
        whole = client.generate(text.text, **text.params, **RETURNS)
        assert_same(of_result(whole), expected["log-probabilities"])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_our_asyncio_client_all_at_once(
    real: Served, expected: dict[str, Answer], protocol: str
) -> None:
    async with AsyncCharoniaClient(address(real, protocol)) as client:

        async def stream(ask: Ask) -> list[StreamChunk]:
            options = {**ask.params, **RETURNS}
            if ask.messages is not None:
                return [chunk async for chunk in client.chat(ask.messages, stream=True, **options)]
            return [c async for c in client.stream(ask.text, token_ids=ask.token_ids, **options)]

        answers = await asyncio.gather(*(stream(ask) for ask in ASKS.values()))
    for name, chunks in zip(ASKS, answers, strict=True):
        assert_same(of_result(GenerateResult.from_chunks(chunks)), expected[name])


def test_command_line(real: Served, expected: dict[str, Answer]) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "charonia_client", *arguments, "--temperature=0", "--max-tokens=16"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    printed = json.loads(run("generate", "--json", f"--url={real.grpc_url}", TEXTS["emoji"]))
    (sequence,) = printed["sequences"]
    assert [sequence["text"]] == expected["emoji"].texts
    assert [sequence["token_ids"]] == expected["emoji"].token_ids
    assert run("stream", f"--url={real.http_url}", TEXTS["chinese"]) == expected["chinese"].texts[0] + "\n"


@pytest.mark.parametrize("exclude", [None, False])
def test_the_prompt_is_echoed(real: Served, expected: dict[str, Answer], exclude: bool | None) -> None:
    body = {"text_input": TEXTS["hindi"], **GREEDY}
    if exclude is not None:
        body["exclude_input_in_output"] = exclude
    answer = httpx.post(f"{real.http_url}/v2/models/llm/generate", json=body, timeout=120).json()
    assert answer["text_output"] == TEXTS["hindi"] + expected["hindi"].texts[0]


# ---- embeddings ----

EMBEDDED = {
    "text": {"input": TEXTS["chinese"], "pooling_params": {}},
    "token ids": {"input": [504, 3575, 282, 4649, 314]},
    "cut": {"input": TEXTS["capital"], "pooling_params": {"dimensions": [64]}},
    "mean": {"input": TEXTS["python class"], "pooling_params": {"pooling_type": "mean", "normalize": False}},
}


@pytest.fixture(scope="module")
def embeddings(real_model: Path) -> dict[str, tuple[list[float], int]]:
    """Of the offline engine: vectors, and how many tokens went in."""
    prompts = [ask["input"] for ask in EMBEDDED.values()]
    params = [PoolingParams.from_mapping(ask.get("pooling_params", {})) for ask in EMBEDDED.values()]
    with LLM(str(real_model), dtype="float32", max_num_seqs=4) as llm:
        outputs = llm.embed(prompts, params, use_tqdm=False)
    return {
        name: (output.outputs.embedding, len(output.prompt_token_ids))
        for name, output in zip(EMBEDDED, outputs, strict=True)
    }


def test_embeddings_over_http(real: Served, embeddings: dict[str, tuple[list[float], int]]) -> None:
    for name, (vector, num_tokens) in embeddings.items():
        body = {"embedding_request": json.dumps(EMBEDDED[name]), "return_num_input_tokens": True,
                "return_num_output_tokens": True}  # fmt: skip
        answer = httpx.post(f"{real.http_url}/v2/models/llm/generate", json=body, timeout=60).json()
        assert json.loads(answer["text_output"]) == pytest.approx(vector, abs=1e-4)
        assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (num_tokens, 0)
    norms = {name: sum(value * value for value in vector) for name, (vector, _) in embeddings.items()}
    assert norms["text"] == pytest.approx(1) and norms["cut"] == pytest.approx(1) and norms["mean"] > 2
    assert len(embeddings["cut"][0]) == 64


def test_embeddings_as_clients_of_the_vllm_backend_ask(
    real: Served, embeddings: dict[str, tuple[list[float], int]]
) -> None:
    """On one stream, beside text, with the empty `text_input` that those clients send."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = grpcclient.InferenceServerClient(real.grpc_url)
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for name, ask in EMBEDDED.items():
        inputs = triton_texts(text_input="", embedding_request=json.dumps(ask))
        client.async_stream_infer("llm", inputs, request_id=name)
    client.async_stream_infer("llm", triton_texts(text_input="One"), request_id="generated")
    found = {}
    for _ in range(len(EMBEDDED) + 1):
        result, error = answers.get(timeout=60)
        assert error is None
        found[result.get_response().id] = result.as_numpy("text_output")[0].decode()
    client.stop_stream()
    client.close()
    assert found.pop("generated").startswith("One")
    for name, text in found.items():
        assert json.loads(text) == pytest.approx(embeddings[name][0], abs=1e-4)


def triton_texts(**values: str) -> list[Any]:
    """Inputs of one string each."""
    inputs = []
    for name, value in values.items():
        inputs.append(grpcclient.InferInput(name, [1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([value.encode()], dtype=object))
    return inputs


def test_a_cancelled_embedding_leaves_the_engine(real: Served) -> None:
    """The longest prompt there can be takes seconds; its client goes away at once."""
    cancelled = 'charonia_requests_total{outcome="cancelled"}'
    before = real.metrics().get(cancelled, 0.0)
    ask = json.dumps({"input": [7] * 8192})
    client = grpcclient.InferenceServerClient(real.grpc_url)
    client.start_stream(callback=lambda result, error: None)
    client.async_stream_infer("llm", triton_texts(embedding_request=ask))
    assert eventually(lambda: real.metrics()["charonia_requests_running"] == 1, 20)
    client.stop_stream(cancel_requests=True)
    client.close()
    assert eventually(lambda: real.metrics().get(cancelled) == before + 1, 20)
    real.wait_idle()
