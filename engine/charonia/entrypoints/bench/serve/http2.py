"""As much of HTTP/2 as a client of gRPC streams needs, with as little work for each frame as possible.

Header compression is `hpack`'s. The Python libraries of gRPC take several times as long for a message, and one process
should be able to listen to all that a server says (`benchmarks/RESULTS.md`).
"""

import asyncio
import struct
import time
from collections.abc import Iterable
from typing import Protocol

import hpack

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER = struct.Struct(">IBI")
"""Length (24 bits) and type (8), flags, stream: 9 bytes."""
_WORD = struct.Struct(">I")
_SETTING = struct.Struct(">HI")

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    0,
    1,
    3,
    4,
    6,
    7,
    8,
    9,
)
_END_STREAM = _ACK = 0x1
_END_HEADERS = 0x4
_PADDED, _PRIORITY = 0x8, 0x20
_CANCEL = 0x8

_HEADER_TABLE_SIZE, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 3, 4, 5
_WINDOW = 2**31 - 1
"""The largest window there is: a client that only counts what comes never holds a server back."""
_TOP_UP = 2**30


class StreamSink(Protocol):
    """Who reads a stream. Called from the event loop, and never again after `on_end`."""

    def on_data(self, data: bytes, now_ns: int) -> None:
        """Part of the body, and when it was read."""

    def on_end(self, headers: dict[str, str], now_ns: int, error: str | None) -> None:
        """The stream is over: every header and trailer that came, or what broke it."""


class _Stream:
    """One stream. window: bytes that may be sent. pending: bytes that wait for it. received: since the last top-up."""

    def __init__(self, sink: StreamSink, window: int) -> None:
        self.sink = sink
        self.window = window
        self.pending = bytearray()
        self.closing = False
        self.received = 0
        self.headers: dict[str, str] = {}


class Http2Connection(asyncio.Protocol):
    """A connection that was made with prior knowledge, or negotiated by TLS."""

    def __init__(self) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.max_streams = 2**31 - 1
        self.is_open = True
        self._transport: asyncio.Transport
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1
        self._rest = b""
        self._window = self._initial_window = 65_535
        self._max_frame = 16_384
        self._received = 0
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._block: tuple[int, bool, bytes] | None = None

    @property
    def num_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    # ---- sending ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open with the largest windows."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        body = _SETTING.pack(_INITIAL_WINDOW, _WINDOW)
        more = _WORD.pack(_WINDOW - 65_535)
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, body) + _frame(_WINDOW_UPDATE, 0, 0, more))

    def open_stream(self, headers: Iterable[tuple[str, str]], sink: StreamSink) -> int:
        """Start a stream; its body follows by `send`."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._streams[stream_id] = _Stream(sink, self._initial_window)
        self._transport.write(_frame(_HEADERS, _END_HEADERS, stream_id, self._encoder.encode(headers)))
        return stream_id

    def send(self, stream_id: int, data: bytes) -> None:
        """Send part of a body, as fast as the server allows. Nothing happens on a stream that has ended."""
        if (stream := self._streams.get(stream_id)) is not None:
            stream.pending += data
            self._flush(stream_id, stream)

    def half_close(self, stream_id: int) -> None:
        """Say that the body is complete."""
        if (stream := self._streams.get(stream_id)) is not None and not stream.closing:
            stream.closing = True
            self._flush(stream_id, stream)

    def reset(self, stream_id: int) -> None:
        """Cancel a stream; its sink hears nothing more."""
        if self._streams.pop(stream_id, None) is not None:
            self._transport.write(_frame(_RST_STREAM, 0, stream_id, _WORD.pack(_CANCEL)))

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def _flush(self, stream_id: int, stream: _Stream) -> None:
        out = []
        pending = stream.pending
        while pending and (size := min(len(pending), self._max_frame, self._window, stream.window)) > 0:
            last = stream.closing and size == len(pending)
            out.append(_frame(_DATA, _END_STREAM if last else 0, stream_id, bytes(pending[:size])))
            del pending[:size]
            self._window -= size
            stream.window -= size
            if last:
                stream.closing = False
        if stream.closing and not pending:
            out.append(_frame(_DATA, _END_STREAM, stream_id, b""))
        if out:
            self._transport.write(b"".join(out))

    # ---- receiving ----

    def data_received(self, data: bytes) -> None:
        """Every frame in it was read now."""
        now = time.monotonic_ns()
        if self._rest:
            data = self._rest + data
        start, size = 0, len(data)
        while size - start >= 9:
            word, flags, stream_id = _HEADER.unpack_from(data, start)
            begin = start + 9
            end = begin + (word >> 8)
            if end > size:
                break
            kind = word & 0xFF
            if kind == _DATA and not flags:
                self._received += end - begin
                stream = self._streams.get(stream_id)
                if stream is not None:
                    stream.received += end - begin
                    stream.sink.on_data(data[begin:end], now)
            else:
                self._handle(kind, flags, stream_id & _WINDOW, data[begin:end], now)
            start = end
        self._rest = data[start:]
        if self._received > _TOP_UP:
            self._top_up()

    def connection_lost(self, error: Exception | None) -> None:
        """Every stream ends with it."""
        self.is_open = False
        self._fail(list(self._streams), f"connection lost: {error or 'closed by the server'}")
        if not self.ready.done():
            self.ready.set_exception(
                ConnectionError("the server closed the connection: it may not speak HTTP/2")
            )

    def _handle(self, kind: int, flags: int, stream_id: int, body: bytes, now: int) -> None:
        if kind == _DATA:
            self._received += len(body)
            stream = self._streams.get(stream_id)
            if stream is not None:
                stream.received += len(body)
                if body:
                    stream.sink.on_data(_unpadded(body, flags), now)
            if flags & _END_STREAM:
                self._end(stream_id, now)
        elif kind == _HEADERS:
            body = _unpadded(body, flags)
            self._block = stream_id, bool(flags & _END_STREAM), body[5:] if flags & _PRIORITY else body
            self._end_headers(flags, now)
        elif kind == _CONTINUATION and self._block is not None:
            stream_id, last, start = self._block
            self._block = stream_id, last, start + body
            self._end_headers(flags, now)
        elif kind == _SETTINGS and not flags & _ACK:
            self._configure(body)
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, body))
        elif kind == _WINDOW_UPDATE:
            self._open_window(stream_id, _WORD.unpack(body)[0] & _WINDOW)
        elif kind == _RST_STREAM:
            self._fail([stream_id], f"stream reset by the server, HTTP/2 error {_WORD.unpack(body)[0]}")
        elif kind == _GOAWAY:
            self.is_open = False
            last_id = _WORD.unpack_from(body)[0] & _WINDOW
            self._fail([each for each in self._streams if each > last_id], "the server is going away")

    def _end_headers(self, flags: int, now: int) -> None:
        if not flags & _END_HEADERS or self._block is None:
            return
        stream_id, last, block = self._block
        self._block = None
        headers = self._decoder.decode(block)
        if (stream := self._streams.get(stream_id)) is not None:
            stream.headers.update((str(name), str(value)) for name, value in headers)
        if last:
            self._end(stream_id, now)

    def _configure(self, body: bytes) -> None:
        for name, value in _SETTING.iter_unpack(body):
            if name == _INITIAL_WINDOW:
                for stream in self._streams.values():
                    stream.window += value - self._initial_window
                self._initial_window = value
            elif name == _MAX_FRAME:
                self._max_frame = value
            elif name == _MAX_STREAMS:
                self.max_streams = value
            elif name == _HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, 4096)
        self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        if not self.ready.done():
            self.ready.set_result(None)
        self._flush_all()

    def _open_window(self, stream_id: int, size: int) -> None:
        if not stream_id:
            self._window += size
            self._flush_all()
        elif (stream := self._streams.get(stream_id)) is not None:
            stream.window += size
            if stream.pending:
                self._flush(stream_id, stream)

    def _flush_all(self) -> None:
        for stream_id, stream in self._streams.items():
            if stream.pending:
                self._flush(stream_id, stream)

    def _top_up(self) -> None:
        """Give back what was read since the last time, so that no window ever closes."""
        updates = [(0, self._received)]
        updates += [
            (stream_id, stream.received) for stream_id, stream in self._streams.items() if stream.received
        ]
        self._transport.write(
            b"".join(_frame(_WINDOW_UPDATE, 0, each, _WORD.pack(size)) for each, size in updates)
        )
        self._received = 0
        for stream in self._streams.values():
            stream.received = 0

    def _end(self, stream_id: int, now: int) -> None:
        if (stream := self._streams.pop(stream_id, None)) is not None:
            stream.sink.on_end(stream.headers, now, None)

    def _fail(self, stream_ids: list[int], error: str) -> None:
        now = time.monotonic_ns()
        for stream_id in stream_ids:
            if (stream := self._streams.pop(stream_id, None)) is not None:
                stream.sink.on_end(stream.headers, now, error)


def _frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return _HEADER.pack(len(body) << 8 | kind, flags, stream_id) + body


def _unpadded(body: bytes, flags: int) -> bytes:
    return body[1 : len(body) - body[0]] if flags & _PADDED else body
