"""How `charonia bench serve` reads and writes HTTP, fed by hand."""

import asyncio
from typing import Any

import pytest
from charonia.entrypoints.bench.serve.http1 import Http1Connection
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
