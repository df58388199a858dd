"""Server-sent events over HTTP/1.1, with as little work for each event as possible."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

_HEAD_LIMIT = 64 * 1024
_ERROR_BODY_LIMIT = 1000


class EventSink(Protocol):
    """Who reads an answer. Called from the event loop."""

    def on_event(self, data: bytes, now_ns: int) -> None:
        """The data of one server-sent event, and when it was read."""

    def on_end(self, now_ns: int, error: str | None) -> None:
        """The answer is complete, or broken. Called once."""


class Http1Connection(asyncio.Protocol):
    """A connection that carries one request after the other.

    on_free: called after each answer, and not when the connection is lost.
    """

    def __init__(self, on_free: "Callable[[Http1Connection], None]") -> None:
        self.is_open = True
        self._on_free = on_free
        self._transport: asyncio.Transport
        self._sink: EventSink | None = None
        self._reset()

    def _reset(self) -> None:
        self._rest = b""
        self._events = b""
        self._status = 0
        self._in_body = self._chunked = self._close_after = False
        self._left: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes, sink: EventSink) -> None:
        """Send a whole request; the answer before it has ended."""
        self._sink = sink
        self._transport.write(request)

    def close(self) -> None:
        """Close the connection; its sink hears nothing more."""
        self.is_open, self._sink = False, None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Every event in it was read now."""
        now = time.monotonic_ns()
        data = self._rest + data if self._rest else data
        self._rest = b""
        try:
            if not self._in_body:
                head, end, data = data.partition(b"\r\n\r\n")
                if not end:
                    if len(head) > _HEAD_LIMIT:
                        raise ValueError("headers too long")
                    self._rest = head
                    return
                self._read_head(head)
            complete = self._read_body(data, now)
        except ValueError as error:
            self.is_open = False
            self._transport.abort()
            self._end(now, f"the answer is not HTTP: {error}")
            return
        if complete:
            self._end(now, None)

    def connection_lost(self, error: Exception | None) -> None:
        """An answer without a length ends here; any other is broken."""
        self.is_open = False
        complete = self._in_body and not self._chunked and self._left is None and error is None
        self._end(
            time.monotonic_ns(), None if complete else f"connection lost: {error or 'closed by the server'}"
        )

    def _read_head(self, head: bytes) -> None:
        status, *lines = head.split(b"\r\n")
        version, code, *_ = status.split(b" ", 2)
        pairs = (line.partition(b":") for line in lines)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
        self._in_body, self._status = True, int(code)
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self._left = int(headers[b"content-length"]) if b"content-length" in headers else None
        connection = headers.get(b"connection", b"")
        self._close_after = connection == b"close" or (version == b"HTTP/1.0" and connection != b"keep-alive")

    def _read_body(self, data: bytes, now: int) -> bool:
        """Take the events of a part of the body; says whether the body is complete."""
        complete = False
        if self._chunked:
            data, complete = self._unchunked(data)
        elif self._left is not None:
            self._left -= len(data)
            complete = self._left <= 0
        if self._status != 200:
            self._events = (self._events + data)[:_ERROR_BODY_LIMIT]
            return complete
        if b"\r" in data:  # only in line ends: JSON escapes it
            data = data.replace(b"\r", b"")
        *events, self._events = (self._events + data).split(b"\n\n")
        if complete and self._events.strip():
            events.append(self._events)
        for event in events:
            if (begin := event.find(b"data:")) >= 0 and self._sink is not None:
                self._sink.on_event(event[begin + 5 :].strip(), now)
        return complete

    def _unchunked(self, data: bytes) -> tuple[bytes, bool]:
        """The chunks that are there as a whole, and whether the last one is."""
        parts, start, complete = [], 0, False
        while (line := data.find(b"\r\n", start)) >= 0:
            size = int(data[start:line].partition(b";")[0], 16)
            end = line + 4 + size
            if not size:
                complete = data.find(b"\r\n\r\n", line) >= 0
                break
            if end > len(data):
                break
            parts.append(data[line + 2 : end - 2])
            start = end
        self._rest = data[start:]
        return b"".join(parts), complete

    def _end(self, now: int, error: str | None) -> None:
        sink, self._sink = self._sink, None
        if error is None and self._status != 200:
            error = f"HTTP {self._status}: {self._events.decode(errors='replace').strip()}"
        if self._close_after:
            self.close()
        self._reset()
        if self.is_open:
            self._on_free(self)
        if sink is not None:
            sink.on_end(now, error)
