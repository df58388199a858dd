"""Clients that go away, in every state and through every front door, against the real server."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc.aio as aioclient
from charonia.entrypoints.triton_server import TritonServer
from support.scripted_server import Events, GrpcStream, add_model, eventually, running, tensors, texts

pytestmark = pytest.mark.server

NOTICED_WITHIN_S = 0.25
"""About 100 ms on a quiet machine; the machines of tests are not."""
STATES = {
    "queued": {"queue_s": 60},
    "prefilling": {"prefill_s": 60},
    "decoding": {"tokens": 9999, "delay_s": 0.005},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonServer, Path]]:
    root = tmp_path_factory.mktemp("cancellation")
    runtime = add_model(root / "repository")
    # Cancelling a gRPC stream just after its last response may keep this release from ending.
    with running(root / "repository", exit_timeout_s=2) as server:
        yield server, runtime


@pytest.fixture
def server(served: tuple[TritonServer, Path]) -> Iterator[TritonServer]:
    pid = served[0].process.pid
    yield served[0]
    assert served[0].is_ready(), "the server did not survive"
    with GrpcStream(served[0].grpc_url) as stream:
        stream.send(tensors("still alive", exclude_input_in_output=True))
        assert texts(stream.collect()[""]) == ["still alive"]
    assert served[0].process.pid == pid


@pytest.fixture
def events(served: tuple[TritonServer, Path]) -> Events:
    return Events(served[1])


def prompt(state: str) -> str:
    return "@" + json.dumps(STATES[state]) + " x"


def check_cancel(events: Events, name: str, state: str, cancel: Callable[[], object]) -> None:
    """Cancel the request once it is in the state, and see the engine told in time."""
    events.wait("submit", name)
    if state != "queued":
        events.wait("scheduled", name)
        time.sleep(0.05)
    begun = time.monotonic()
    cancel()
    abort = events.wait("abort", name)
    assert abort["state"] == state
    assert abort["time"] - begun < NOTICED_WITHIN_S


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("stream", [True, False])
def test_grpc_client_cancels(server: TritonServer, events: Events, state: str, stream: bool) -> None:
    name = f"grpc-{state}-{stream}"
    opened = GrpcStream(server.grpc_url)
    opened.send(tensors(prompt(state), sampling={"max_tokens": 9999}, stream=stream), request_id=name)
    check_cancel(events, name, state, lambda: opened.client.stop_stream(cancel_requests=True))
    opened.client.close()


async def disconnect(
    server: TritonServer, events: Events, name: str, script: dict[str, Any], after: str
) -> dict[str, Any]:
    """Close the HTTP connection of a streaming request some time after an event. Returns the abort; adds `waited`."""
    body = {"text_input": "@" + json.dumps(script) + " x", "stream": True, "max_tokens": 9999, "id": name}
    url = f"http://{server.http_url}/v2/models/llm/generate_stream"

    async def read(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", url, json=body, timeout=30) as response:
            async for _ in response.aiter_raw():
                pass

    async with httpx.AsyncClient() as client:
        reading = asyncio.create_task(read(client))
        await asyncio.to_thread(events.wait, after, name)
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        abort = await asyncio.to_thread(events.wait, "abort", name)
        return abort | {"waited": abort["time"] - begun}


async def test_http_client_disconnects(server: TritonServer, events: Events) -> None:
    abort = await disconnect(server, events, "http", STATES["decoding"], "scheduled")
    assert abort["state"] == "decoding"
    assert abort["waited"] < NOTICED_WITHIN_S


async def test_http_client_disconnects_before_the_first_response(
    server: TritonServer, events: Events
) -> None:
    """Until it has something to write, the server's HTTP front does not notice, and so neither can the model."""
    script = {"prefill_s": 0.5} | STATES["decoding"]
    abort = await disconnect(server, events, "http-early", script, "scheduled")
    assert abort["state"] == "decoding"
    assert abort["waited"] < 0.5 + NOTICED_WITHIN_S


def test_a_deadline_of_the_call_cancels(server: TritonServer, events: Events) -> None:
    async def ask() -> None:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": "llm",
                "inputs": tensors(prompt("queued"), stream=True),
                "request_id": "deadline",
            }
            await asyncio.sleep(30)

        async with aioclient.InferenceServerClient(server.grpc_url) as client:
            with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
                async for _ in client.stream_infer(requests(), stream_timeout=0.5):
                    pass

    asyncio.run(ask())
    assert events.wait("abort", "deadline")["state"] == "queued"


def test_the_others_on_a_server_are_left_alone(server: TritonServer, events: Events) -> None:
    with GrpcStream(server.grpc_url) as staying, GrpcStream(server.grpc_url) as leaving:
        staying.send(tensors('@{"delay_s": 0.02, "tokens": 40}', sampling={"max_tokens": 99}, stream=True))
        leaving.send(
            tensors(prompt("decoding"), sampling={"max_tokens": 9999}, stream=True), request_id="leaves"
        )
        events.wait("scheduled", "leaves")
        leaving.client.stop_stream(cancel_requests=True)
        events.wait("abort", "leaves")
        assert "".join(texts(staying.collect()[""])) == " ".join(f"w{i}" for i in range(40))


def test_cancelling_one_of_several_streams_ends_all_its_requests_and_no_others(
    server: TritonServer, events: Events
) -> None:
    """The server cancels calls: a client that wants to cancel single requests gives each a stream of its own."""
    streams = [GrpcStream(server.grpc_url) for _ in range(3)]
    script = '@{"delay_s": 0.02, "tokens": 60}'
    for state in STATES:
        for i, stream in enumerate(streams):
            name = f"cross-{i}-{state}"
            asked = script if i == 1 else prompt(state)
            stream.send(tensors(asked, sampling={"max_tokens": 9999}, stream=True), request_id=name)
            events.wait("submit", name)
    for i in (2, 0):
        streams[i].client.stop_stream(cancel_requests=True)
    gathered = streams[1].collect(len(STATES))
    whole = " ".join(f"w{i}" for i in range(60))
    assert {name: "".join(texts(results)) for name, results in gathered.items()} == {
        f"cross-1-{state}": whole for state in STATES
    }
    for state in STATES:
        for i in (0, 2):
            events.wait("abort", f"cross-{i}-{state}")
        assert not events("abort", f"cross-1-{state}")
    streams[1].client.stop_stream()
    for stream in streams:
        stream.client.close()


def test_hundreds_of_cancellations_do_not_kill_the_server(server: TritonServer, events: Events) -> None:
    """Most cancellations come close to the end of their request: there FINAL and the cancellation meet."""
    rounds, streams = 16, 32

    def churn(worker: int) -> None:
        for i in range(rounds * streams // 8):
            opened = GrpcStream(server.grpc_url)
            script = '@{"delay_s": 0.002} a b c d e f g h'
            opened.send(tensors(script, stream=True), request_id=f"churn-{worker}-{i}")
            time.sleep(0.001 * (i % 24))
            opened.client.stop_stream(cancel_requests=True)
            opened.client.close()

    workers = [threading.Thread(target=churn, args=(worker,)) for worker in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert server.is_ready()
    with GrpcStream(server.grpc_url) as stream:
        eventually(lambda: len(events("submit")) > 0)
        stream.send(tensors("a b", stream=True))
        assert "".join(texts(stream.collect()[""])) == "a b"
