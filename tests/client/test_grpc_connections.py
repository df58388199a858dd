"""The client's connections against a server of which the test writes every frame: limits, refusals, ends, back-off."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import hpack
import pytest
from charonia_client import (
    AsyncCharoniaClient,
    RequestCancelledError,
    ServerUnavailableError,
    grpc_connections,
)
from charonia_client.grpc_wire import MessageReader, framed
from tritonclient.grpc import service_pb2

pytestmark = pytest.mark.timeout(60)
REFUSED_STREAM, CANCEL = 7, 8


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body


def settings(max_streams: int | None = None) -> bytes:
    return frame(4, 0, 0, b"" if max_streams is None else b"\0\x03" + max_streams.to_bytes(4, "big"))


def reset(stream_id: int, code: int) -> bytes:
    return frame(3, 0, stream_id, code.to_bytes(4, "big"))


def go_away(last_id: int) -> bytes:
    return frame(7, 0, 0, last_id.to_bytes(4, "big") + bytes(4))


class Peer:
    """The server's side of one connection. opened: streams that were begun. resets: those that were cancelled."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.opened: list[int] = []
        self.live: set[int] = set()
        self.resets: list[tuple[int, int]] = []
        self.most = 0
        self.gone_away: int | None = None
        self._writer = writer
        self._encoder = hpack.Encoder()
        self._readers: dict[int, MessageReader] = {}
        self._requests: list[Any] = []

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def answer(self, stream_id: int, messages: list[Any], *, ends: bool = True) -> None:
        """Send whole messages, after the head of the answer, and the trailers."""
        head = self._encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
        data = frame(1, 0x4, stream_id, head)
        data += b"".join(frame(0, 0, stream_id, framed(each.SerializeToString())) for each in messages)
        if ends:
            data += frame(1, 0x5, stream_id, self._encoder.encode([("grpc-status", "0")]))
            self.live.discard(stream_id)
        self.send(data)

    def take(self, kind: int, stream_id: int, body: bytes) -> list[Any]:
        """A frame of the client. Returns the requests that it completes."""
        self._requests.clear()
        if kind == 1:
            self.opened.append(stream_id)
            self.live.add(stream_id)
            self.most = max(self.most, len(self.live))
        elif kind == 0:
            if stream_id not in self._readers:
                self._readers[stream_id] = MessageReader(self._keep)
            self._readers[stream_id].feed(body)
        elif kind == 3:
            self.resets.append((stream_id, int.from_bytes(body, "big")))
            self.live.discard(stream_id)
        elif kind == 7:
            self.gone_away = int.from_bytes(body[4:], "big")
        return list(self._requests)

    def _keep(self, message: bytes) -> None:
        self._requests.append(service_pb2.ModelInferRequest.FromString(message))


OnRequest = Callable[["FrameServer", Peer, int, Any], None]


class FrameServer:
    """Greets with frames, and calls `on_request` with each request. peers: the connections that were made."""

    def __init__(self, on_request: OnRequest, greeting: bytes = settings()) -> None:
        self.peers: list[Peer] = []
        self.requests = 0
        self.greeting = greeting
        self.hang_up = False
        self._on_request = on_request

    @property
    def peer(self) -> Peer:
        (peer,) = self.peers
        return peer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peers.append(peer := Peer(writer))
        try:
            if self.hang_up:
                return
            peer.send(self.greeting)
            await reader.readexactly(24)
            while True:
                head = await reader.readexactly(9)
                body = await reader.readexactly(int.from_bytes(head[:3], "big"))
                stream_id = int.from_bytes(head[5:], "big")
                for request in peer.take(head[3], stream_id, body):
                    self.requests += 1
                    self._on_request(self, peer, stream_id, request)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def listening(server: FrameServer, port: int = 0) -> AsyncIterator[str]:
    """The address of a server that is running."""
    listener = await asyncio.start_server(server.serve, "127.0.0.1", port)
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 (what is awaited is the state of the code under test)
            await asyncio.sleep(0.005)


@pytest.fixture
def one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_connections, "_MAX_CONNECTIONS", 1)


# ---- a server that limits the streams of a connection ----


def holding(answers: Any) -> tuple[list[Callable[[], None]], OnRequest]:
    """What a server has to answer yet, the oldest first, and the handler that notes it instead of answering."""
    held: list[Callable[[], None]] = []

    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        held.append(lambda: peer.answer(stream_id, [answers.content(request, "x", final=True)]))

    return held, on_request


@pytest.mark.usefixtures("one_connection")
async def test_requests_wait_for_a_free_stream(answers: Any) -> None:
    order = []

    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        order.append(request.id)
        answer = [answers.content(request, "x", final=True)]
        asyncio.get_running_loop().call_later(0.01, peer.answer, stream_id, answer)

    server = FrameServer(on_request, settings(max_streams=2))
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        names = [f"r{i}" for i in range(12)]
        results = await asyncio.gather(*(client.generate("p", request_id=name) for name in names))
    assert [each.text for each in results] == ["x"] * 12
    assert order == names
    assert server.peer.most == 2 and len(server.peer.opened) == 12


async def test_a_full_connection_is_joined_by_another(answers: Any) -> None:
    held, on_request = holding(answers)
    server = FrameServer(on_request, settings(max_streams=2))
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        tasks = [asyncio.create_task(client.generate("p")) for _ in range(5)]
        await until(lambda: len(held) == 5)
        assert [each.most for each in server.peers] == [2, 2, 1]
        for answer in held:
            answer()
        assert [each.text for each in await asyncio.gather(*tasks)] == ["x"] * 5


@pytest.mark.usefixtures("one_connection")
async def test_who_gives_up_waiting_keeps_no_place(answers: Any) -> None:
    held, on_request = holding(answers)
    server = FrameServer(on_request, settings(max_streams=1))
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        connections = client._transport._connections  # type: ignore[attr-defined]
        tasks = [asyncio.create_task(client.generate("p")) for _ in range(4)]
        await until(lambda: len(held) == 1 and len(connections._waiting) == 3)
        tasks[1].cancel()
        (connection,) = await connected(client)
        give_room = connection._on_room

        def give_room_and_cancel() -> None:
            give_room()
            tasks[2].cancel()  # the place is its own by now, and it has not taken it

        connection._on_room = give_room_and_cancel
        held.pop()()
        await until(lambda: len(held) == 1)
        held.pop()()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in ends[1:3]] == [asyncio.CancelledError] * 2
        assert [each.text for each in (ends[0], ends[3])] == ["x", "x"]  # type: ignore[union-attr]
        assert not connections._waiting


@pytest.mark.usefixtures("one_connection")
async def test_all_who_wait_go_on_when_the_server_allows_more(answers: Any) -> None:
    held, on_request = holding(answers)
    server = FrameServer(on_request, settings(max_streams=1))
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        connections = client._transport._connections  # type: ignore[attr-defined]
        tasks = [asyncio.create_task(client.generate("p")) for _ in range(6)]
        await until(lambda: len(held) == 1 and len(connections._waiting) == 5)
        server.peer.send(settings(max_streams=5))
        await until(lambda: len(held) == 5)
        assert server.peer.most == 5 and len(connections._waiting) == 1
        for _ in range(6):
            await until(lambda: bool(held))
            held.pop(0)()
        assert [each.text for each in await asyncio.gather(*tasks)] == ["x"] * 6


@pytest.mark.usefixtures("one_connection")
async def test_closing_ends_the_wait_for_a_stream() -> None:
    server = FrameServer(lambda server, peer, stream_id, request: None, settings(max_streams=1))
    async with listening(server) as url:
        client = AsyncCharoniaClient(url, retries=0, requests_per_stream=1)
        tasks = [asyncio.create_task(client.generate("p")) for _ in range(3)]
        await until(lambda: server.requests == 1)
        await client.aclose()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in ends] == [RequestCancelledError] * 3
    assert server.requests == 1


# ---- requests that the server has never seen ----


async def test_a_refused_request_is_sent_again_once(answers: Any) -> None:
    refusals = [1]

    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        if server.requests <= refusals[0]:
            peer.send(reset(stream_id, REFUSED_STREAM))
        else:
            peer.answer(stream_id, [answers.content(request, "x", final=True)])

    server = FrameServer(on_request)
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0) as client:
        assert (await client.generate("p")).text == "x"
        assert server.requests == 2
        refusals[0] = 100
        with pytest.raises(ServerUnavailableError, match="REFUSED_STREAM"):
            await client.generate("p")
    assert server.requests == 4 and len(server.peer.opened) == 4


async def test_no_request_is_sent_again_after_part_of_an_answer(answers: Any) -> None:
    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        peer.answer(stream_id, [answers.content(request, "part")], ends=False)
        peer.send(reset(stream_id, REFUSED_STREAM))

    server = FrameServer(on_request)
    async with listening(server) as url, AsyncCharoniaClient(url, retries=2) as client:
        stream = client.stream("p")
        assert (await anext(stream)).text == "part"
        with pytest.raises(ServerUnavailableError, match="REFUSED_STREAM"):
            await anext(stream)
    assert server.requests == 1


async def test_a_cancelled_stream_is_not_sent_again() -> None:
    server = FrameServer(lambda server, peer, stream_id, request: peer.send(reset(stream_id, CANCEL)))
    async with listening(server) as url, AsyncCharoniaClient(url, retries=2) as client:
        with pytest.raises(RequestCancelledError):
            await client.generate("p")
    assert server.requests == 1


async def test_what_a_leaving_server_has_not_seen_goes_to_a_new_connection(answers: Any) -> None:
    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        if len(server.peers) == 1:
            if len(peer.opened) == 3:
                peer.send(go_away(last_id=1))
                peer.answer(1, [answers.content(first[0], "old", final=True)])
            else:
                first.append(request)
        else:
            peer.answer(stream_id, [answers.content(request, "new", final=True)])

    first: list[Any] = []
    server = FrameServer(on_request)
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        results = await asyncio.gather(*(client.generate("p") for _ in range(3)))
        assert [each.text for each in results] == ["old", "new", "new"]
        assert [len(each.opened) for each in server.peers] == [3, 2]
        await until(lambda: server.peers[0].gone_away == 0)


async def test_a_call_on_a_leaving_connection_takes_no_more_requests(answers: Any) -> None:
    first: list[tuple[Peer, int, Any]] = []

    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        if first:
            peer.answer(stream_id, [answers.content(request, "new", final=True)])
        else:
            first.append((peer, stream_id, request))
            peer.send(go_away(last_id=stream_id))

    server = FrameServer(on_request)
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0) as client:
        old = asyncio.create_task(client.generate("p"))
        (connection,) = await connected(client)
        await until(lambda: not connection.is_open)
        assert (await client.generate("p")).text == "new"
        assert len(server.peers) == 2
        peer, stream_id, request = first[0]
        peer.answer(stream_id, [answers.content(request, "old", final=True)])
        assert (await old).text == "old"


@pytest.mark.usefixtures("one_connection")
async def test_a_leaving_connection_keeps_no_new_one_from_being_made(answers: Any) -> None:
    held: list[Callable[[], None]] = []

    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        if len(server.peers) == 1:
            held.append(lambda: peer.answer(stream_id, [answers.content(request, "old", final=True)]))
        else:
            peer.answer(stream_id, [answers.content(request, "new", final=True)])

    server = FrameServer(on_request, settings(max_streams=1))
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        connections = client._transport._connections  # type: ignore[attr-defined]
        tasks = [asyncio.create_task(client.generate("p", timeout=20)) for _ in range(4)]
        await until(lambda: len(held) == 1 and len(connections._waiting) == 3)
        server.peer.send(go_away(last_id=1))
        assert [(await each).text for each in tasks[1:]] == ["new"] * 3
        held[0]()
        assert (await tasks[0]).text == "old"
        assert len(server.peers) == 2


async def connected(client: AsyncCharoniaClient) -> list[Any]:
    connections: list[Any] = client._transport._connections._connections  # type: ignore[attr-defined]
    await until(lambda: bool(connections))
    return list(connections)


# ---- reconnecting ----


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        pytest.param(None, "connection was lost", id="hangs up"),
        pytest.param(settings() + go_away(0), "going away", id="goes away"),
        pytest.param(settings(max_streams=0), "takes no requests", id="no streams"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak HTTP/2", id="HTTP/1.1"),
    ],
)
async def test_attempts_to_connect_keep_to_a_growing_back_off(greeting: bytes | None, message: str) -> None:
    server = FrameServer(lambda server, peer, stream_id, request: None, greeting or b"")
    server.hang_up = greeting is None
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0) as client:
        start = time.monotonic()
        while (passed := time.monotonic() - start) < 0.8 or len(server.peers) < 2:
            with pytest.raises(ServerUnavailableError, match=message):
                await client.generate("p", timeout=20)
            await asyncio.sleep(0.005)
        # Attempts begin no sooner than 0, 0.1, 0.3, 0.7, 1.5 s and then every second.
        allowed = 1 + sum(passed >= begin for begin in (0.1, 0.3, 0.7, 1.5)) + max(0, int(passed - 1.5))
        assert len(server.peers) <= allowed


async def test_a_server_that_comes_back_is_found(answers: Any) -> None:
    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        peer.answer(stream_id, [answers.content(request, "x", final=True)])

    server = FrameServer(on_request)
    async with listening(server) as url, AsyncCharoniaClient(url, retries=20) as client:
        assert (await client.generate("p")).text == "x"
        server.hang_up = True
        (connection,) = await connected(client)
        connection.abort()
        task = asyncio.create_task(client.generate("p"))
        await until(lambda: len(server.peers) >= 3)
        server.hang_up = False
        assert (await task).text == "x"
        connections = client._transport._connections  # type: ignore[attr-defined]
        assert connections._backoff_s == 0


async def test_one_attempt_serves_all_and_survives_those_who_give_up(answers: Any) -> None:
    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        peer.answer(stream_id, [answers.content(request, "x", final=True)])

    server = FrameServer(on_request, greeting=b"")
    async with listening(server) as url, AsyncCharoniaClient(url, retries=0, requests_per_stream=1) as client:
        tasks = [asyncio.create_task(client.generate("p")) for _ in range(3)]
        await until(lambda: len(server.peers) == 1)
        tasks[0].cancel()
        with suppress(asyncio.CancelledError):
            await tasks[0]
        server.peer.send(settings())
        assert [(await each).text for each in tasks[1:]] == ["x", "x"]
        assert len(server.peers) == 1


# ---- cancelling ----


async def test_cancelled_requests_leave_nothing_behind(answers: Any) -> None:
    def on_request(server: FrameServer, peer: Peer, stream_id: int, request: Any) -> None:
        peer.answer(stream_id, [answers.content(request, "part")], ends=False)

    server = FrameServer(on_request)
    async with listening(server) as url, AsyncCharoniaClient(url, requests_per_stream=1) as client:
        tasks = [asyncio.create_task(client.generate("p")) for _ in range(20)]
        await until(lambda: server.requests == 20)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        (connection,) = await connected(client)
        assert connection.num_streams == 0 and not client._transport._calls  # type: ignore[attr-defined]
        await until(lambda: len(server.peer.resets) == 20)
        assert {code for _, code in server.peer.resets} == {CANCEL}
        assert connection.is_open
