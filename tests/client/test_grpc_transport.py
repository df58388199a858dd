"""gRPC against a scripted server: sharing of streams, failures, retries, cancellation, time limits."""

import asyncio
import itertools
import threading
import time
from collections import Counter

import grpc
import pytest
from charonia_client import (
    AsyncCharoniaClient,
    CharoniaClient,
    InternalServerError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
    RequestCancelledError,
    RequestFailedError,
    RequestTimeoutError,
    ServerUnavailableError,
)

pytestmark = pytest.mark.timeout(60)


def prompt_of(request):
    index = next(i for i, tensor in enumerate(request.inputs) if tensor.name == "text_input")
    return request.raw_input_contents[index][4:].decode()


@pytest.fixture
def echo(answers):
    """Answer each request with its prompt, in one response."""

    def script(number, requests, context):
        for request in requests:
            yield answers.content(request, prompt_of(request), final=True)

    return script


async def texts(stream):
    return [chunk.text async for chunk in stream]


async def test_interleaved_answers_on_one_stream_reach_their_requests(scripted_grpc, answers):
    def script(number, requests, context):
        batch = list(itertools.islice(requests, 3))
        for part in range(3):
            for request in reversed(batch):
                yield answers.content(request, f"{prompt_of(request)}{part}", final=part == 2)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        results = await asyncio.gather(*(texts(client.stream(name)) for name in "abc"))
    assert results == [[f"{name}{part}" for part in range(3)] for name in "abc"]
    assert server.service.calls == 1


def test_threads_share_streams_too(scripted_grpc, answers):
    def script(number, requests, context):
        batch = list(itertools.islice(requests, 4))
        for request in reversed(batch):
            yield answers.content(request, prompt_of(request), final=True)

    server = scripted_grpc(script)
    results = {}
    with CharoniaClient(server.url) as client:
        threads = [
            threading.Thread(target=lambda name=name: results.update({name: client.generate(name).text}))
            for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {name: name for name in "abcd"}
    assert server.service.calls == 1


async def test_a_full_stream_makes_room_in_a_new_one(scripted_grpc, answers):
    def script(number, requests, context):
        for request in requests:
            time.sleep(0.1)
            yield answers.content(request, str(number), final=True)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url, requests_per_stream=2) as client:
        results = await asyncio.gather(*(client.generate("x") for _ in range(5)))
    assert sorted(Counter(result.text for result in results).values()) == [1, 2, 2]


async def test_equal_request_ids_do_not_meet(scripted_grpc, answers):
    def script(number, requests, context):
        for request in requests:
            time.sleep(0.1)
            yield answers.content(request, prompt_of(request), final=True)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        results = await asyncio.gather(*(client.generate(name, request_id="same") for name in "ab"))
    assert [(result.text, result.request_id) for result in results] == [("a", "same"), ("b", "same")]


async def test_an_idle_stream_is_half_closed(scripted_grpc, answers):
    ended = threading.Event()

    def script(number, requests, context):
        for request in requests:
            yield answers.content(request, "x", final=True)
        ended.set()

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        await client.generate("x")
        assert await asyncio.to_thread(ended.wait, 10)


async def test_the_request_message(scripted_grpc, answers):
    seen = []

    def script(number, requests, context):
        for request in requests:
            seen.append(request)
            yield answers.content(request, "x", final=True)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url, headers={"X-Tenant": "t"}) as client:
        await client.generate(token_ids=[1, 70000], model="m", model_version="2", request_id="r", timeout=2.5)
    (request,) = seen
    assert (request.model_name, request.model_version, request.id) == ("m", "2", "r")
    assert request.parameters["timeout"].int64_param == 2_500_000
    assert request.parameters["triton_enable_empty_final_response"].bool_param
    tensors = {
        t.name: (t.datatype, list(t.shape), d)
        for t, d in zip(request.inputs, request.raw_input_contents, strict=True)
    }
    assert tensors["input_ids"] == ("INT32", [2], b"\x01\0\0\0\x70\x11\x01\0")
    assert tensors["stream"] == ("BOOL", [1], b"\0")
    (metadata,) = server.service.metadata
    assert metadata["x-tenant"] == "t"
    assert "triton_grpc_error" not in metadata


async def test_an_empty_final_response_ends_a_request(scripted_grpc, answers):
    def script(number, requests, context):
        for request in requests:
            yield answers.content(request, "a")
            yield answers.empty_final(request)

    async with AsyncCharoniaClient(scripted_grpc(script).url) as client:
        assert await texts(client.stream("x")) == ["a"]
        assert (await client.generate("x")).text == "a"


async def test_a_stream_without_a_response_is_an_error(scripted_grpc, answers):
    def script(number, requests, context):
        for request in requests:
            yield answers.empty_final(request)

    async with AsyncCharoniaClient(scripted_grpc(script).url) as client:
        with pytest.raises(InternalServerError, match="without a response"):
            await texts(client.stream("x"))
        with pytest.raises(InternalServerError, match="got 0"):
            await client.generate("x")


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Request for unknown model: 'llm' is not found", NotFoundError),
        ("Request for unknown model: 'llm' has no available versions", ModelNotReadyError),
        ("Model 'llm' is not ready", ModelNotReadyError),
        ("Stub process 'llm_0_0' is not healthy.", ModelNotReadyError),
        (
            "[request id: 1] inference input 'stream' data-type is 'INT32', but model 'llm' expects 'BOOL'",
            InvalidRequestError,
        ),
        ("unexpected inference input 'foo' for model 'llm'", InvalidRequestError),
        ("something of the model's own", RequestFailedError),
    ],
)
async def test_error_messages_are_typed_and_leave_neighbours_alone(scripted_grpc, answers, message, kind):
    def script(number, requests, context):
        bad, good = itertools.islice(requests, 2)
        yield answers.error(bad, message)
        yield answers.content(good, "fine", final=True)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        bad, good = await asyncio.gather(client.generate("a"), client.generate("b"), return_exceptions=True)
    assert type(bad) is kind
    assert message in str(bad)
    assert f"model 'llm' at {server.url}" in str(bad)
    assert good.text == "fine"
    assert server.service.calls == 1


async def test_a_broken_stream_fails_its_requests_and_the_next_opens_a_new_one(scripted_grpc, answers, echo):
    def script(number, requests, context):
        if number == 0:
            for request in list(itertools.islice(requests, 2)):
                yield answers.content(request, "part")
            context.abort(grpc.StatusCode.INTERNAL, "boom")
        yield from echo(number, requests, context)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        errors = await asyncio.gather(*(texts(client.stream("x")) for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in errors] == [InternalServerError] * 2
        assert "boom" in str(errors[0])
        assert errors[0] is not errors[1]
        assert await texts(client.stream("again")) == ["again"]
    assert server.service.calls == 2


async def test_a_stream_that_the_server_ends_early_is_an_error(scripted_grpc, answers):
    def script(number, requests, context):
        yield answers.content(next(requests), "part")

    async with AsyncCharoniaClient(scripted_grpc(script).url) as client:
        with pytest.raises(ServerUnavailableError, match="closed the stream"):
            await texts(client.stream("x"))


@pytest.mark.parametrize("retries", [0, 2])
async def test_retries_are_bounded(scripted_grpc, retries):
    def script(number, requests, context):
        next(requests)
        context.abort(grpc.StatusCode.UNAVAILABLE, "full")
        yield

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url, retries=retries) as client:
        with pytest.raises(ServerUnavailableError, match="full"):
            await client.generate("x")
    assert server.service.calls == retries + 1


async def test_retry_succeeds_once_the_server_has_room(scripted_grpc, answers, echo):
    def script(number, requests, context):
        if number == 0:
            yield answers.error(next(requests), "Exceeds maximum queue size")
        yield from echo(number, requests, context)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        assert (await client.generate("x")).text == "x"
    assert server.service.calls == 2


async def test_nothing_is_sent_again_after_part_of_an_answer(scripted_grpc, answers):
    def script(number, requests, context):
        yield answers.content(next(requests), "part")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url, retries=5) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "part"
        with pytest.raises(ServerUnavailableError, match="gone"):
            await anext(stream)
    assert server.service.calls == 1


async def test_other_errors_are_not_retried(scripted_grpc):
    def script(number, requests, context):
        next(requests)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        yield

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        with pytest.raises(InvalidRequestError, match="no"):
            await client.generate("x")
    assert server.service.calls == 1


async def test_a_server_that_starts_late_is_found(scripted_grpc, echo, free_port):
    async with AsyncCharoniaClient(f"127.0.0.1:{free_port}", retries=30) as client:
        task = asyncio.create_task(client.generate("x"))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(scripted_grpc, echo, free_port)
        assert (await task).text == "x"


def test_nothing_listens(free_port):
    with CharoniaClient(f"127.0.0.1:{free_port}", retries=1) as client:
        with pytest.raises(ServerUnavailableError, match="make serve") as caught:
            client.generate("x")
        assert str(free_port) in str(caught.value)
        with pytest.raises(ServerUnavailableError, match="make serve"):
            client.health()
        assert client.is_ready() is False


@pytest.fixture
def endless(answers):
    """Answer a request token by token until its call is cancelled; `cancelled` tells that it was."""

    class Endless:
        def __init__(self):
            self.cancelled = threading.Event()

        def __call__(self, number, requests, context):
            context.add_callback(self.cancelled.set)
            request = next(requests)
            while context.is_active():
                yield answers.content(request, "x ")
                time.sleep(0.01)

    return Endless()


async def test_a_cancelled_task_cancels_its_call(scripted_grpc, endless):
    async with AsyncCharoniaClient(scripted_grpc(endless).url) as client:
        task = asyncio.create_task(texts(client.stream("x")))
        await asyncio.sleep(0.2)
        assert not endless.cancelled.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(endless.cancelled.wait, 10)


async def test_leaving_the_loop_cancels(scripted_grpc, endless):
    async with AsyncCharoniaClient(scripted_grpc(endless).url) as client:
        async with client.stream("x") as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(endless.cancelled.wait, 10)
        assert await texts(stream) == []


async def test_a_time_limit_cancels(scripted_grpc, endless):
    async with AsyncCharoniaClient(scripted_grpc(endless).url) as client:
        with pytest.raises(RequestTimeoutError, match=r"within 0\.2 s"):
            await texts(client.stream("x", timeout=0.2))
        assert await asyncio.to_thread(endless.cancelled.wait, 10)


def test_another_thread_cancels(scripted_grpc, endless):
    with CharoniaClient(scripted_grpc(endless).url) as client:
        stream = client.stream("x")
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        with pytest.raises(RequestCancelledError, match=stream.request_id):
            for _ in stream:
                pass
        assert list(stream) == []
        assert endless.cancelled.wait(10)


def test_a_stream_cancelled_at_once_ends(scripted_grpc, endless):
    with CharoniaClient(scripted_grpc(endless).url) as client:
        for _ in range(50):
            stream = client.stream("x")
            stream.cancel()
            with pytest.raises(RequestCancelledError):
                list(stream)


def test_a_forgotten_stream_is_cancelled(scripted_grpc, endless):
    with CharoniaClient(scripted_grpc(endless).url) as client:
        next(client.stream("x"))
        assert endless.cancelled.wait(10)


async def test_a_cancelled_request_does_not_disturb_its_neighbour(scripted_grpc, answers):
    proceed = threading.Event()
    context_ended = threading.Event()

    def script(number, requests, context):
        context.add_callback(context_ended.set)
        pair = list(itertools.islice(requests, 2))
        for request in pair:
            yield answers.content(request, "1")
        proceed.wait(10)
        for request in pair:
            yield answers.content(request, "2")
        yield answers.content(pair[1], "3", final=True)
        while context.is_active():
            yield answers.content(pair[0], "unheard")
            time.sleep(0.01)

    server = scripted_grpc(script)
    async with AsyncCharoniaClient(server.url) as client:
        victim = asyncio.create_task(texts(client.stream("victim")))
        await asyncio.sleep(0.1)
        neighbour = asyncio.create_task(texts(client.stream("neighbour")))
        await asyncio.sleep(0.2)
        victim.cancel()
        await asyncio.wait([victim])
        assert not context_ended.is_set()
        proceed.set()
        assert await neighbour == ["1", "2", "3"]
        assert await asyncio.to_thread(context_ended.wait, 10)
    assert server.service.calls == 1


async def test_closing_the_client_ends_what_is_in_flight(scripted_grpc, endless):
    client = AsyncCharoniaClient(scripted_grpc(endless).url)
    task = asyncio.create_task(texts(client.stream("x")))
    await asyncio.sleep(0.2)
    await client.aclose()
    with pytest.raises(RequestCancelledError, match="closed"):
        await task
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        await client.server_metadata()


def test_closing_the_client_ends_other_threads_waits(scripted_grpc, endless):
    client = CharoniaClient(scripted_grpc(endless).url)
    stream = client.stream("x")
    next(stream)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(RequestCancelledError):
        for _ in stream:
            pass
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        client.stream("x")


def test_closing_the_client_ends_a_wait_between_retries(free_port):
    client = CharoniaClient(f"127.0.0.1:{free_port}", retries=1000)
    threading.Timer(0.3, client.close).start()
    with pytest.raises(RequestCancelledError, match="closed"):
        client.generate("x")


async def test_an_unreadable_tensor_is_the_servers_fault(scripted_grpc, answers):
    def script(number, requests, context):
        message = answers.content(next(requests), "abc", final=True)
        message.infer_response.raw_output_contents[0] = b"\xff\0\0\0abc"
        yield message

    async with AsyncCharoniaClient(scripted_grpc(script).url) as client:
        with pytest.raises(InternalServerError, match="cannot be read"):
            await client.generate("x")
