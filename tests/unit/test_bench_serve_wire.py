"""How `charonia bench serve` reads and writes HTTP, fed by hand."""

import asyncio
from typing import Any

import hpack
import pytest
from charonia.entrypoints.bench.serve.http1 import Http1Connection
from charonia.entrypoints.bench.serve.http2 import Http2Connection
from charonia.entrypoints.bench.serve.http_backends import _OpenAiAnswer, _TritonAnswer
from charonia.entrypoints.bench.serve.records import RequestRecord

# ---- server-sent events ----


class Heard:
    """An `EventSink` that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.ends: list[str | None] = []

    def on_event(self, data: bytes, now_ns: int) -> None:
        self.events.append(data)

    def on_end(self, now_ns: int, error: str | None) -> None:
        self.ends.append(error)


class NoTransport(asyncio.Transport):
    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def hear(
    answer: bytes, *, step: int, lost: bool = False
) -> tuple[Heard, list[Http1Connection], Http1Connection]:
    """What is heard of an answer that comes in pieces, where the connection is free again, and the connection."""
    free: list[Http1Connection] = []
    connection, heard = Http1Connection(free.append), Heard()
    connection.connection_made(NoTransport())
    connection.send(b"", heard)
    for i in range(0, len(answer), step):
        connection.data_received(answer[i : i + step])
    if lost:
        connection.connection_lost(None)
    return heard, free, connection


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = (
    HEAD
    + b'Transfer-Encoding: Chunked\r\n\r\na\r\ndata: {"a"\r\nd;x=1\r\n:1}\n\ndata: {}\n\r\n1\r\n\n\r\n0\r\n\r\n'
)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_chunked_events_in_pieces(step: int) -> None:
    heard, free, connection = hear(CHUNKED, step=step)
    assert heard.events == [b'{"a":1}', b"{}"] and heard.ends == [None] and free == [connection]


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_other_ends_of_an_answer(step: int) -> None:
    body = b": ping\r\n\r\nevent: x\r\ndata: 1\r\n\r\ndata: 2"
    heard, free, _ = hear(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, step=step)
    assert heard.events == [b"1", b"2"] and heard.ends == [None] and len(free) == 1
    heard, free, _ = hear(HEAD + b"\r\ndata: 1\n\n", step=step, lost=True)
    assert heard.events == [b"1"] and heard.ends == [None] and not free
    heard, free, connection = hear(
        HEAD + b"Connection: close\r\nContent-Length: 9\r\n\r\ndata: 1\n\n", step=step
    )
    assert heard.ends == [None] and not free and not connection.is_open
    heard, free, _ = hear(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull", step=step)
    assert heard.ends == ["HTTP 503: full"] and len(free) == 1


def test_broken_answers() -> None:
    for cut in (0, 10, len(HEAD) + 30, len(CHUNKED) - 3):
        heard, free, _ = hear(CHUNKED[:cut], step=1000, lost=True)
        assert heard.ends == ["connection lost: closed by the server"] and not free
    heard, free, connection = hear(b"nonsense\r\n\r\n", step=1000, lost=True)
    assert (
        len(heard.ends) == 1 and "not HTTP" in (heard.ends[0] or "") and not free and not connection.is_open
    )


# ---- HTTP/2 ----


class HeardStream:
    """A `StreamSink` that keeps what it hears."""

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[tuple[dict[str, str], str | None]] = []

    def on_data(self, data: bytes, now_ns: int) -> None:
        self.data += data

    def on_end(self, headers: dict[str, str], now_ns: int, error: str | None) -> None:
        self.ends.append((headers, error))


class KeptTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

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
            frame(0, 0, 99, b"of a stream that is gone"),
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
    assert "error 7" in (sinks[2].ends[0][1] or "") and "going away" in (sinks[3].ends[0][1] or "")
    assert not connection.is_open and connection.num_streams == 0
    assert [each[:2] for each in frames(transport.sent)] == [(4, 1), (6, 1)]
    assert frames(transport.sent)[1][3] == b"12345678"


async def test_http2_sends_no_more_than_the_windows_allow() -> None:
    connection, transport = Http2Connection(), KeptTransport()
    connection.connection_made(transport)
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


async def test_http2_tops_windows_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("charonia.entrypoints.bench.serve.http2._TOP_UP", 20)
    connection, transport = Http2Connection(), KeptTransport()
    connection.connection_made(transport)
    stream = connection.open_stream([(":method", "POST")], HeardStream())
    transport.sent = b""
    connection.data_received(frame(0, 0, stream, bytes(20)))
    assert not transport.sent
    connection.data_received(frame(0, 0, stream, bytes(5)) + frame(0, 0, 99, bytes(5)))
    assert frames(transport.sent) == [(8, 0, 0, b"\0\0\0\x1e"), (8, 0, stream, b"\0\0\0\x19")]


# ---- events ----


def test_events_of_triton() -> None:
    record = RequestRecord(0, lambda _: None)
    answer = _TritonAnswer(record)
    for data in (
        b'{"num_output_tokens":2,"num_input_tokens":9,"text_output":"a"}',
        b'{"num_output_tokens":[1,3]}',
    ):
        answer.on_event(data, 5)
    assert record.tokens.tolist() == [2, 4] and record.prompt_tokens == 9
    answer.on_event(b'{"error":"too long"}', 6)
    answer.on_end(7, None)
    assert record.error == "too long"


def test_events_of_openai() -> None:
    record = RequestRecord(0, lambda _: None)
    answer = _OpenAiAnswer(record)
    for data in (
        b'{"choices":[{"delta":{"role":"assistant","content":""}}]}',  # no token yet
        b'{"choices":[{"delta":{"content":"a"}}],"usage":null}',
        b'{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}',
        b'{"choices":[{"text":"b","finish_reason":null}]}',
        b'{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":6}}',
        b"[DONE]",
    ):
        answer.on_event(data, 5)
    answer.on_end(7, None)
    assert record.tokens.tolist() == [1, 1, 1] and record.error is None
    assert (record.prompt_tokens, record.reported_tokens) == (11, 6)


def test_events_of_openai_with_continuous_usage() -> None:
    record = RequestRecord(0, lambda _: None)
    answer = _OpenAiAnswer(record)
    for count in (0, 3, 4):
        answer.on_event(
            b'{"choices":[{"text":"b"}],"usage":{"prompt_tokens":2,"completion_tokens":%d}}' % count, 5
        )
    answer.on_event(b"{", 5)
    answer.on_end(7, None)
    assert record.tokens.tolist() == [3, 1] and "cannot be read" in (record.error or "")
