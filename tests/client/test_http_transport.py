"""HTTP against a scripted server: events, failures, retries, cancellation, time limits."""

import asyncio
import json
import threading
import time

import pytest
from charonia_client import (
    AsyncCharoniaClient,
    CharoniaClient,
    CharoniaClientError,
    InternalServerError,
    InvalidRequestError,
    NotFoundError,
    RequestCancelledError,
    RequestFailedError,
    RequestTimeoutError,
    ServerUnavailableError,
)

pytestmark = pytest.mark.timeout(60)


def answer(text, **outputs):
    return json.dumps(
        {"model_name": "llm", "model_version": "1", "text_output": text, **outputs}, ensure_ascii=False
    )


def event(text, **outputs):
    return f"data: {answer(text, **outputs)}\n\n".encode()


async def texts(stream):
    return [chunk.text async for chunk in stream]


async def test_events_are_split_at_newlines_alone(scripted_http):
    """The text may hold every other line separator of Unicode; chunks may end inside a character."""
    parts = ["a\u2028b", "c\u0085d\x0b", "é\u2029", "end"]
    body = b"".join(event(part) for part in parts)

    def script(number):
        yield 200
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    async with AsyncCharoniaClient(scripted_http(script).url) as client:
        assert await texts(client.stream("x")) == parts


async def test_the_request_body(scripted_http):
    def script(number):
        yield 200
        yield answer("x", num_input_tokens=2, num_output_tokens=1, finish_reason="length").encode()

    server = scripted_http(script)
    async with AsyncCharoniaClient(server.url) as client:
        result = await client.generate(token_ids=[1, 2], max_tokens=1, request_id="r", timeout=2.5)
    body = json.loads(server.bodies[0])
    assert body["input_ids"] == [1, 2]
    assert (body["id"], body["timeout"]) == ("r", 2_500_000)
    assert json.loads(body["sampling_parameters"]) == {"max_tokens": 1}
    assert (result.request_id, result.finish_reason, result.usage.num_input_tokens) == ("r", "length", 2)


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, b'{"error": "no such parameter"}', RequestFailedError, "no such parameter"),
        (400, b'data: {"error": "no such parameter"}\n\n', RequestFailedError, "no such parameter"),
        (400, b'{"error": "unexpected inference input \'x\'"}', InvalidRequestError, "unexpected"),
        (
            404,
            b'{"error": "Request for unknown model: \'llm\' is not found"}',
            NotFoundError,
            "unknown model",
        ),
        (
            500,
            b'{"error": "failed to parse the request JSON buffer"}',
            InvalidRequestError,
            "failed to parse",
        ),
        (500, b"<html>oops</html>", InternalServerError, "oops"),
        (503, b"", ServerUnavailableError, "HTTP status 503"),
        (200, b'{"error": "generate expects 1 response"}', RequestFailedError, "expects 1"),
        (200, b"not json", InternalServerError, "not a JSON object"),
        (200, b"[1]", InternalServerError, "not a JSON object"),
        (200, b'{"model_name": "llm"}', InternalServerError, "serving contract"),
    ],
)
async def test_errors_are_typed(scripted_http, status, body, kind, message):
    def script(number):
        yield status
        yield body

    server = scripted_http(script)
    async with AsyncCharoniaClient(server.url, retries=0) as client:
        with pytest.raises(CharoniaClientError, match=message) as caught:
            await client.generate("x")
    assert type(caught.value) is kind
    assert server.url in str(caught.value)


async def test_an_error_may_come_late(scripted_http):
    def script(number):
        yield 200
        yield event("part")
        yield b'data: {"error": "unknown model"}\n\n'

    async with AsyncCharoniaClient(scripted_http(script).url) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "part"
        with pytest.raises(NotFoundError):
            await anext(stream)


async def test_a_connection_that_breaks_midway_is_an_error_and_not_retried(scripted_http):
    def script(number):
        yield 200
        yield event("part")
        raise ConnectionError

    server = scripted_http(script)
    async with AsyncCharoniaClient(server.url) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "part"
        with pytest.raises(ServerUnavailableError, match="connection broke"):
            await anext(stream)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("rest", [b"", b'data: {"text_output": "lost"'], ids=["nothing", "half an event"])
async def test_a_stream_that_ends_before_its_answer_is_an_error(scripted_http, rest):
    """As a proxy may end it."""

    def script(number):
        yield 200
        yield event(["a", "b"], finish_reason=["stop", "None"])
        if rest:
            yield rest

    async with AsyncCharoniaClient(scripted_http(script).url) as client:
        stream = client.stream("x", n=2)
        assert (await anext(stream)).text == "a"
        with pytest.raises(ServerUnavailableError, match="before the answer was complete"):
            await anext(stream)


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[]", b"{}", b"5"])
async def test_a_server_that_is_no_triton(scripted_http, body):
    def script(number):
        yield 200
        yield body

    async with AsyncCharoniaClient(scripted_http(script).url) as client:
        for question in (client.server_metadata, client.model_metadata):
            with pytest.raises(InternalServerError, match="is not Triton's"):
                await question()


async def test_retries_until_the_server_has_room(scripted_http):
    def script(number):
        yield 503 if number < 2 else 200
        yield answer("x").encode()

    server = scripted_http(script)
    async with AsyncCharoniaClient(server.url, retries=2) as client:
        assert (await client.generate("x")).text == "x"
    assert len(server.bodies) == 3


def test_nothing_listens(free_port):
    with CharoniaClient(f"127.0.0.1:{free_port}", protocol="http", retries=1) as client:
        with pytest.raises(ServerUnavailableError, match="make serve"):
            client.generate("x")
        with pytest.raises(ServerUnavailableError, match="make serve"):
            client.health()
        assert client.is_ready() is False


@pytest.fixture
def endless():
    """Stream events until the client disconnects; `disconnected` tells that it did."""

    class Endless:
        def __init__(self):
            self.disconnected = threading.Event()

        def __call__(self, number):
            try:
                yield 200
                for _ in range(3000):
                    yield event("x ")
                    time.sleep(0.01)
            finally:
                self.disconnected.set()

    return Endless()


async def test_a_cancelled_task_disconnects(scripted_http, endless):
    async with AsyncCharoniaClient(scripted_http(endless).url) as client:
        task = asyncio.create_task(texts(client.stream("x")))
        await asyncio.sleep(0.2)
        assert not endless.disconnected.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(endless.disconnected.wait, 10)


async def test_a_time_limit_disconnects(scripted_http, endless):
    async with AsyncCharoniaClient(scripted_http(endless).url) as client:
        with pytest.raises(RequestTimeoutError, match=r"within 0\.2 s"):
            await texts(client.stream("x", timeout=0.2))
        assert await asyncio.to_thread(endless.disconnected.wait, 10)


def test_another_thread_cancels(scripted_http, endless):
    with CharoniaClient(scripted_http(endless).url) as client:
        stream = client.stream("x")
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        with pytest.raises(RequestCancelledError):
            for _ in stream:
                pass
        assert endless.disconnected.wait(10)


def test_a_request_is_cancelled_before_its_first_byte(scripted_http):
    """The server sends headers with the first token, so this is a request in its queue."""
    asked, release = threading.Event(), threading.Event()

    def script(number):
        asked.set()
        release.wait(10)
        yield 200

    with CharoniaClient(scripted_http(script).url) as client:
        stream = client.stream("x")
        assert asked.wait(10)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            next(stream)
        release.set()


async def test_closing_the_client_ends_what_is_in_flight(scripted_http, endless):
    client = AsyncCharoniaClient(scripted_http(endless).url)
    task = asyncio.create_task(texts(client.stream("x")))
    await asyncio.sleep(0.2)
    await client.aclose()
    with pytest.raises(RequestCancelledError, match="closed"):
        await task
    assert await asyncio.to_thread(endless.disconnected.wait, 10)
