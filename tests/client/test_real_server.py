"""Every surface of the client against the real Triton server, with a model that echoes its prompt."""

import asyncio
import json
import threading
import time

import pytest
from charonia_client import (
    AsyncCharoniaClient,
    CharoniaClient,
    CharoniaClientError,
    GenerateResult,
    NotFoundError,
    RequestFailedError,
    RequestTimeoutError,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


@pytest.fixture(params=["grpc", "http"])
def url(request, triton):
    return triton.grpc_url if request.param == "grpc" else triton.http_url


@pytest.fixture
def client(url):
    with CharoniaClient(url) as client:
        yield client


@pytest.fixture
async def aio_client(url):
    async with AsyncCharoniaClient(url) as client:
        yield client


def cancelled_prompts(client):
    return json.loads(client.generate("?cancelled").text)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_generate(client):
    result = client.generate(
        "a b c d", max_tokens=3, n=2, logprobs=1, return_token_ids=True, return_timings=True
    )
    assert [s.text for s in result.sequences] == ["a b c"] * 2
    assert result.finish_reason == "length"
    assert (result.usage.num_input_tokens, result.usage.num_output_tokens) == (3, 6)
    assert [len(s.token_ids) for s in result.sequences] == [3, 3]
    positions = zip(result.logprobs, result.token_ids, strict=True)
    assert [position[token].decoded_token for position, token in positions] == ["a", " b", " c"]
    assert result.timings.num_cached_tokens == 3
    assert (result.model, result.model_version) == ("llm", "1")


def test_generate_from_token_ids_chat_and_echo(client):
    assert client.generate(token_ids=[7]).text == "<7>"
    assert client.generate("hi", echo=True).text == "hihi"
    assert client.chat([{"role": "user", "content": "Grüße\u2028you"}]).text == "user: Grüße you"


def test_stream_joins_to_generate(client):
    options = {"n": 2, "logprobs": 0, "return_token_ids": True, "return_cumulative_logprob": True}
    chunks = list(client.stream("a b c", **options))
    assert [chunk.text for chunk in chunks] == ["a", " b", " c"]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    joined, whole = GenerateResult.from_chunks(chunks), client.generate("a b c", **options)
    assert [s.token_ids for s in joined.sequences] == [s.token_ids for s in whole.sequences]
    assert (joined.text, joined.logprobs, joined.usage) == (whole.text, whole.logprobs, whole.usage)


def test_prompt_logprobs_and_stop_reasons(client):
    options = {"stop": ["END"], "prompt_logprobs": 0, "return_stop_reason": True}
    whole = client.generate("a b END c", **options)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("a b", "stop", "END")
    first, *others = whole.prompt_logprobs
    assert first is None
    assert [entry.decoded_token for position in others for entry in position.values()] == ["b", "END", "c"]
    chunks = list(client.stream("a b END c", **options))
    assert [chunk.stop_reason for chunk in chunks] == [None, "END"]
    assert [chunk.prompt_logprobs is not None for chunk in chunks] == [True, False]
    joined = GenerateResult.from_chunks(chunks)
    assert (joined.text, joined.stop_reason) == (whole.text, whole.stop_reason)
    assert joined.prompt_logprobs == whole.prompt_logprobs
    short = client.generate("a b END c", max_tokens=1, stop=["END"], return_stop_reason=True)
    assert (short.finish_reason, short.stop_reason, short.prompt_logprobs) == ("length", None, None)


def test_chat_streams(client):
    assert (
        "".join(c.text for c in client.chat([{"role": "user", "content": "hi"}], stream=True)) == "user: hi"
    )


async def test_asyncio_surface(aio_client):
    client = aio_client
    assert (await client.generate("a b")).text == "a b"
    assert [chunk.text async for chunk in client.stream("a b")] == ["a", " b"]
    assert (await client.chat([{"role": "user", "content": "hi"}])).text == "user: hi"
    async with client.chat([{"role": "user", "content": "hi"}], stream=True) as stream:
        assert "".join([chunk.text async for chunk in stream]) == "user: hi"
    assert await client.is_ready()


async def test_two_hundred_requests_at_once_each_get_their_own_answer(aio_client):
    async def one(i):
        prompt = " ".join(f"{i}.{j}" for j in range(i % 7 + 1))
        chunks = [chunk.text async for chunk in aio_client.stream(prompt)]
        return "".join(chunks) == prompt

    assert all(await asyncio.gather(*(one(i) for i in range(200))))


def test_many_threads_use_one_client(client):
    wrong = []

    def work(name):
        for i in range(10):
            prompt = f"{name} {i} end"
            if "".join(chunk.text for chunk in client.stream(prompt)) != prompt:
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(f"t{k}",)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("after", [0, 1])
def test_model_errors_while_streaming(client, after):
    stream = client.stream(
        "a b c", fake={"error": "UNSUPPORTED", "error_after": after, "message": "not this"}
    )
    for _ in range(after):
        next(stream)
    with pytest.raises(RequestFailedError, match="not this"):
        next(stream)


def test_errors_of_the_server(client):
    with pytest.raises(NotFoundError, match=r"'nope'.*not found"):
        client.generate("x", model="nope")
    with pytest.raises(NotFoundError, match="nope"):
        client.model_metadata("nope")
    with pytest.raises(CharoniaClientError):
        client.generate("x", model_version="99")


def test_cancellation_reaches_the_model(client):
    name = f"cancel-{client.url}"
    with client.stream(f"{name} b c", fake={"delay": 0.2}) as stream:
        assert next(stream).text == name
    wait_until(lambda: f"{name}_b_c" in cancelled_prompts(client))


def test_a_time_limit_reaches_the_model(client):
    name = f"limit-{client.url}"
    with pytest.raises(RequestTimeoutError):
        list(client.stream(f"{name} b c", timeout=0.3, fake={"delay": 0.2}))
    wait_until(lambda: f"{name}_b_c" in cancelled_prompts(client))


def test_a_time_limit_reaches_the_model_before_its_first_response(triton):
    with CharoniaClient(triton.grpc_url) as client:
        with pytest.raises(RequestTimeoutError):
            client.generate("early b c", timeout=0.3, fake={"delay": 0.2})
        wait_until(lambda: "early_b_c" in cancelled_prompts(client))


async def test_neighbours_of_a_cancelled_request_finish(aio_client):
    async def run(prompt):
        return "".join([c.text async for c in aio_client.stream(prompt, fake={"delay": 0.05})])

    victim = asyncio.create_task(run("v " * 12))
    neighbours = [asyncio.create_task(run(f"{i} b c d e f")) for i in range(4)]
    await asyncio.sleep(0.15)
    victim.cancel()
    assert await asyncio.gather(*neighbours) == [f"{i} b c d e f" for i in range(4)]
    assert victim.cancelled()


def test_health_and_metadata(client):
    health = client.health()
    assert (health.live, health.ready, health.model, health.model_ready) == (True, True, "llm", True)
    assert client.health("nope").model_ready is False
    assert client.is_ready()
    assert not client.is_ready("nope")
    server = client.server_metadata()
    assert server.name == "triton"
    assert server.version
    metadata = client.model_metadata()
    assert metadata.versions == ("1",)
    assert {tensor.name: tensor.datatype for tensor in metadata.inputs}["input_ids"] == "INT32"
    assert [tensor.shape for tensor in metadata.outputs if tensor.name == "text_output"] == [(-1,)]
    config = client.model_config()
    assert (config["backend"], config["model_transaction_policy"]["decoupled"]) == ("python", True)
