"""HTTP/2 and gRPC's framing, fed by hand: pieces, limits, and what must not be."""

import asyncio
from typing import Any

import hpack
import pytest
from charonia_client import grpc_wire
from charonia_client.errors import InternalServerError, RequestCancelledError, ServerUnavailableError
from charonia_client.http2 import ErrorCode, Http2Connection, StreamError
from charonia_client.http2.keepalive import Keepalive
from charonia_client.http2.receiving import STREAM_WINDOW
from hypothesis import given, settings
from hypothesis import strategies as st


class HeardStream:
    """A `StreamSink` that keeps what it hears."""

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[tuple[dict[str, str], StreamError | None]] = []
        self.statuses: list[str] = []

    def on_headers(self, headers: dict[str, str]) -> None:
        self.statuses.append(headers[":status"])

    def on_data(self, data: bytes, now_ns: int) -> None:
        self.data += data

    def on_end(self, headers: dict[str, str], now_ns: int, error: StreamError | None) -> None:
        self.ends.append((headers, error))


class KeptTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        self.sent += data


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]))
        data = data[end:]
    return found


SETTINGS = frame(4, 0, 0)


def opened(streams: int = 1) -> tuple[Http2Connection, KeptTransport, list[HeardStream]]:
    """A connection that is ready, with streams 1, 3, ..."""
    connection, transport = Http2Connection(), KeptTransport()
    connection.connection_made(transport)
    connection.data_received(SETTINGS)
    sinks = [HeardStream() for _ in range(streams)]
    for sink in sinks:
        connection.open_stream([(":method", "POST")], sink)
    transport.sent = b""
    return connection, transport, sinks


@pytest.mark.parametrize("step", [1, 4, 10_000])
async def test_http2_in_pieces(step: int) -> None:
    connection, transport = Http2Connection(), KeptTransport()
    connection.connection_made(transport)
    sinks = [HeardStream() for _ in range(4)]
    streams = [connection.open_stream([(":method", "POST")], sink) for sink in sinks]
    assert streams == [1, 3, 5, 7]
    transport.sent = b""
    encoder = hpack.Encoder()
    head, trailers = (
        encoder.encode([(":status", "200")]),
        encoder.encode([("grpc-status", "0"), ("x", "y" * 50)]),
    )
    data = b"".join(
        [
            frame(
                4, 0, 0, bytes.fromhex("0003 00000009 0005 00004001")
            ),  # 9 streams at most, frames of 16,385
            frame(1, 0x4, 1, head),
            frame(0, 0, 1, b"ab"),
            frame(0, 0x8, 1, b"\x03cd\0\0\0"),  # three bytes of padding
            frame(6, 0, 0, b"12345678"),
            frame(6, 1, 0, b"87654321"),  # an answer, which is not answered
            frame(0, 0, 1, b""),
            frame(1, 0x1, 1, trailers[:5]),
            frame(9, 0x4, 1, trailers[5:]),
            frame(0, 0x1, 3, b"last"),
            frame(3, 0, 5, b"\0\0\0\x07"),
            frame(7, 0, 0, b"\0\0\0\x05\0\0\0\0bye"),
        ]
    )
    for i in range(0, len(data), step):
        connection.data_received(data[i : i + step])
    assert connection.ready.done() and connection.max_streams == 9
    assert (sinks[0].data, sinks[1].data) == (b"abcd", b"last")
    assert sinks[0].ends == [({":status": "200", "grpc-status": "0", "x": "y" * 50}, None)]
    assert sinks[1].ends == [({}, None)]
    assert "error 7" in str(sinks[2].ends[0][1]) and "going away" in str(sinks[3].ends[0][1])
    assert all(sink.ends[0][1].unprocessed for sink in sinks[2:] if sink.ends[0][1] is not None)
    assert sinks[0].statuses == ["200"]
    assert not connection.is_open and connection.num_streams == 0
    sent = frames(transport.sent)
    # Streams 1 and 3 ended before their requests did; the connection has no more streams, and takes none.
    assert [each[:3] for each in sent if each[0] not in (3, 7)] == [(4, 1, 0), (6, 1, 0)]
    assert [(each[2], each[3][3]) for each in sent if each[0] == 3] == [(1, 0), (3, 0)]
    assert sent[-1][0] == 7 and transport.closing
    assert next(each[3] for each in sent if each[0] == 6) == b"12345678"


async def test_http2_sends_no_more_than_the_windows_allow() -> None:
    connection, transport = Http2Connection(), KeptTransport()
    connection.connection_made(transport)
    connection.data_received(SETTINGS)
    stream, other = (connection.open_stream([(":method", "POST")], HeardStream()) for _ in range(2))
    transport.sent = b""

    def sent() -> dict[int, int]:
        counts = {stream: 0, other: 0}
        for kind, _, stream_id, body in frames(transport.sent):
            if kind == 0:
                assert len(body) <= 16_384
                counts[stream_id] += len(body)
        return counts

    connection.send(stream, bytes(100_000))
    connection.half_close(stream)
    connection.send(other, b"abc")
    assert sent() == {stream: 65_535, other: 0}
    connection.data_received(frame(8, 0, stream, (10).to_bytes(4, "big")))
    assert sent() == {stream: 65_535, other: 0}  # the connection's window is shut
    connection.data_received(frame(8, 0, 0, (1_000_000).to_bytes(4, "big")))
    assert sent() == {stream: 65_545, other: 3}
    connection.data_received(frame(4, 0, 0, b"\0\x04" + (200_000).to_bytes(4, "big")))
    assert sent() == {stream: 100_000, other: 3}
    ends = [each for each in frames(transport.sent) if each[0] == 0 and each[1] & 1]
    assert [each[2] for each in ends] == [stream]
    connection.reset(other)
    assert frames(transport.sent)[-1] == (3, 0, other, b"\0\0\0\x08")


async def test_a_paused_stream_is_allowed_no_more_than_its_window() -> None:
    connection, transport, (slow, quick) = opened(2)
    connection.pause(1)
    piece = bytes(16_384)
    for _ in range(STREAM_WINDOW // len(piece)):
        connection.data_received(frame(0, 0, 1, piece) + frame(0, 0, 3, piece))
    updates = [each for each in frames(transport.sent) if each[0] == 8]
    assert {each[2] for each in updates} == {3}
    assert sum(int.from_bytes(each[3], "big") for each in updates) > STREAM_WINDOW // 2
    transport.sent = b""
    connection.resume(1)
    assert frames(transport.sent) == [(8, 0, 1, STREAM_WINDOW.to_bytes(4, "big"))]
    connection.pause(1)
    for _ in range(STREAM_WINDOW // len(piece)):
        connection.data_received(frame(0, 0, 1, piece))
    assert not slow.ends
    connection.data_received(frame(0, 0, 1, b"x"))
    assert "allowed" in str(slow.ends[0][1]) and len(quick.ends) == 1 and transport.closing


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ErrorCode.FRAME_SIZE_ERROR),
        (frame(0, 0x8, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),  # more padding than payload
        (frame(0, 0, 2, b"a"), ErrorCode.PROTOCOL_ERROR),  # a stream of nobody
        (frame(0, 0, 99, b"a"), ErrorCode.PROTOCOL_ERROR),
        (frame(1, 0x4, 1, b"\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
        (frame(1, 0, 1, b"\x88") + frame(6, 0, 0, bytes(8)), ErrorCode.PROTOCOL_ERROR),  # within a block
        (frame(1, 0, 1, bytes(16_384)) + frame(9, 0, 1, bytes(16_384)) * 4, ErrorCode.ENHANCE_YOUR_CALM),
        (frame(9, 0x4, 1, b"\x88"), ErrorCode.PROTOCOL_ERROR),
        (frame(4, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(4, 0, 0, b"\0\x04\xff\xff\xff\xff"), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(4, 0, 0, b"\0\x05\0\0\0\x01"), ErrorCode.PROTOCOL_ERROR),
        (frame(5, 0x4, 1, b"\0\0\0\x02"), ErrorCode.PROTOCOL_ERROR),
        (frame(6, 0, 0, b"short"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(7, 0, 0, b"short"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(8, 0, 0, b"\x7f\xff\xff\xff"), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(8, 0, 0, bytes(4)), ErrorCode.FLOW_CONTROL_ERROR),
    ],
)
async def test_what_http2_does_not_allow_ends_the_connection(sent: bytes, code: ErrorCode) -> None:
    connection, transport, (sink,) = opened()
    connection.data_received(sent)
    last = frames(transport.sent)[-1]
    assert (last[0], int.from_bytes(last[3][4:8], "big")) == (7, code)
    assert transport.closing and not connection.is_open
    assert len(sink.ends) == 1 and "broke HTTP/2" in str(sink.ends[0][1])
    connection.data_received(frame(0, 0, 1, b"too late"))
    assert sink.data == b"" and len(sink.ends) == 1


async def test_a_server_of_another_protocol() -> None:
    connection, transport = Http2Connection(), KeptTransport()
    connection.connection_made(transport)
    connection.data_received(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(StreamError, match="does not speak HTTP/2"):
        await connection.ready


async def test_headers_do_not_pile_up_on_a_stream() -> None:
    connection, transport, (sink, other) = opened(2)
    encoder = hpack.Encoder()
    connection.data_received(frame(1, 0x4, 1, encoder.encode([(":status", "103"), ("link", "x")])))
    connection.data_received(frame(1, 0x4, 1, encoder.encode([(":status", "200")])))
    connection.data_received(frame(1, 0x4, 1, encoder.encode([("more", "y")])))
    connection.data_received(frame(1, 0x4, 3, encoder.encode([("no-status", "y")])))
    assert sink.statuses == ["200"] and other.statuses == []
    for heard in (sink, other):
        ((_, error),) = heard.ends
        assert error is not None and error.code == ErrorCode.PROTOCOL_ERROR
    assert frames(transport.sent) == [(3, 0, each, b"\0\0\0\x01") for each in (1, 3)]
    assert connection.is_open and connection.num_streams == 0


async def test_long_headers_are_cut() -> None:
    connection, transport, _ = opened()
    connection.open_stream([(":method", "POST"), ("x", "~" * 40_000)], HeardStream())
    sent = frames(transport.sent)
    assert [each[0] for each in sent] == [1, 9, 9, 9][: len(sent)] and len(sent) > 1
    assert [each[1] for each in sent] == [0] * (len(sent) - 1) + [4]
    assert max(len(each[3]) for each in sent) == 16_384


GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.builds(
        frame,
        st.integers(0, 10),
        st.integers(0, 255),
        st.sampled_from([0, 1, 2, 3, 5]),
        st.binary(max_size=40),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(GARBAGE, max_size=12), st.integers(1, 40))
async def test_garbage_neither_raises_nor_piles_up(parts: list[bytes], step: int) -> None:
    connection, _, sinks = opened(2)
    data = b"".join(parts)
    for i in range(0, len(data), step):
        connection.data_received(data[i : i + step])
    assert len(connection._receiver.rest) < 16_384 + 9
    connection.connection_lost(None)
    assert [len(sink.ends) for sink in sinks] == [1, 1]
    assert connection.closed.done() and connection.num_streams == 0


async def test_a_peer_that_is_silent_is_lost() -> None:
    pings: list[float] = []
    lost: list[float] = []
    loop = asyncio.get_running_loop()

    def ping() -> bool:
        pings.append(loop.time())
        return True

    keepalive = Keepalive(ping, lambda: lost.append(loop.time()), 0.05, 0.03)
    keepalive.start(loop)
    await asyncio.sleep(0.06)
    assert len(pings) == 1
    keepalive.heard = True
    await asyncio.sleep(0.05)
    assert not lost
    await asyncio.sleep(0.2)
    assert len(lost) == 1
    keepalive.stop()


# ---- gRPC ----


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 30))
def test_messages_in_pieces(messages: list[bytes], step: int) -> None:
    heard: list[bytes] = []
    reader = grpc_wire.MessageReader(heard.append)
    data = b"".join(map(grpc_wire.framed, messages))
    for i in range(0, len(data), step):
        reader.feed(data[i : i + step])
    assert heard == messages


@pytest.mark.parametrize("data", [b"\x01\0\0\0\0", b"\0\xff\xff\xff\xff"])
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="message"):
        grpc_wire.MessageReader(print).feed(data)


@pytest.mark.parametrize(
    ("headers", "error", "kind", "text"),
    [
        ({"grpc-status": "13", "grpc-message": "a%20b%C3%A4"}, None, InternalServerError, "a bä"),
        ({"grpc-status": "14"}, None, ServerUnavailableError, "UNAVAILABLE"),
        ({"grpc-status": "x"}, None, Exception, "UNKNOWN"),
        ({":status": "503"}, None, ServerUnavailableError, "HTTP status 503"),
        ({"grpc-status": "0"}, None, ServerUnavailableError, "closed the stream"),
        ({}, StreamError("lost"), ServerUnavailableError, "lost"),
        ({}, StreamError("away", unprocessed=True), grpc_wire.UnprocessedError, "away"),
        ({}, StreamError("no", ErrorCode.CANCEL), RequestCancelledError, "no"),
        ({}, StreamError("no", 77), InternalServerError, "no"),
    ],
)
def test_ends_of_calls(
    headers: dict[str, str], error: StreamError | None, kind: type[Exception], text: str
) -> None:
    told = grpc_wire.end_of_call(headers, error, url="u")
    assert isinstance(told, kind) and text in str(told)


@pytest.mark.parametrize("metadata", [{"a b": "x"}, {"a": "x\r\ny"}, {"a": "\xe9"}, {"a-bin": "x"}])
def test_metadata_that_cannot_be_sent(metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        grpc_wire.call_headers("/p", secure=False, authority="a", metadata=metadata, user_agent="u")
