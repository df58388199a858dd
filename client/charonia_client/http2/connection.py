"""One connection, as an asyncio protocol."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import cast

from charonia_client.http2 import frames
from charonia_client.http2.frames import BrokenProtocolError, ErrorCode, frame
from charonia_client.http2.keepalive import Keepalive
from charonia_client.http2.receiving import CONNECTION_WINDOW, STREAM_WINDOW, Receiver
from charonia_client.http2.sending import Sender
from charonia_client.http2.streams import Stream, StreamError, StreamSink

_MAX_UNSENT = 64 << 20
"""Bytes of answers to a server that does not read them."""
_ABORT_S = 1.0


class Http2Connection(asyncio.Protocol):
    """A connection that was made with prior knowledge, or negotiated by TLS.

    ready: done when the server has sent its settings; streams may be opened from then on. closed: done when the
    connection is. is_open: whether new streams may be opened. max_streams: how many the server takes at a time.
    on_room: called whenever one more may be opened, or none any longer.
    """

    def __init__(self, on_room: Callable[[], None] = lambda: None) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.max_streams = frames.LARGEST
        self.is_open = True
        self._loop = loop
        self._on_room = on_room
        self._transport: asyncio.Transport
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._broken = False
        self._sender = Sender(self._streams, self._write)
        self._receiver = Receiver(self._streams, self._write, self._take)
        self._keepalive = Keepalive(self._ping, self._lost_peer)

    @property
    def num_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    @property
    def has_room(self) -> bool:
        """Whether a stream may be opened now."""
        return self.is_open and len(self._streams) < self.max_streams

    # ---- sending ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open with a window for each stream, and the largest for the connection."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        settings = (
            (frames.ENABLE_PUSH, 0), (frames.INITIAL_WINDOW, STREAM_WINDOW), (frames.MAX_HEADER_LIST, 64 << 10),
        )  # fmt: skip
        body = b"".join(frames.SETTING.pack(*each) for each in settings)
        more = frames.WORD.pack(CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        opening = frame(frames.SETTINGS, 0, 0, body) + frame(frames.WINDOW_UPDATE, 0, 0, more)
        self._transport.write(frames.PREFACE + opening)
        self._keepalive.start(self._loop)

    def open_stream(self, headers: Iterable[tuple[str, str]], sink: StreamSink) -> int:
        """Start a stream; its body follows by `send`."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        if self._next_id > frames.LARGEST:
            self.is_open = False
        self._sender.open(stream_id, headers, sink)
        return stream_id

    def send(self, stream_id: int, data: bytes) -> None:
        """Send part of a body, as fast as the server allows. Nothing happens on a stream that has ended."""
        if (stream := self._streams.get(stream_id)) is not None and not stream.closing:
            stream.pending += data
            self._sender.flush(stream_id, stream)

    def half_close(self, stream_id: int) -> None:
        """Say that the body is complete."""
        if (stream := self._streams.get(stream_id)) is not None and not stream.closing:
            stream.closing = True
            self._sender.flush(stream_id, stream)

    def reset(self, stream_id: int, code: ErrorCode = ErrorCode.CANCEL) -> None:
        """Cancel a stream; its sink hears nothing more."""
        if self._streams.pop(stream_id, None) is not None:
            self._write(_reset(stream_id, code))
            self._left()

    def pause(self, stream_id: int) -> None:
        """Let the server send no more than `STREAM_WINDOW` on a stream until `resume`."""
        if (stream := self._streams.get(stream_id)) is not None:
            stream.paused = True

    def resume(self, stream_id: int) -> None:
        """Let it go on."""
        if (stream := self._streams.get(stream_id)) is not None:
            self._receiver.resume(stream_id, stream)

    def close(self) -> None:
        """Close the connection. Streams that are still open end with an error."""
        if not self._broken:
            self._shut(ErrorCode.NO_ERROR, StreamError("the connection was closed"))

    def abort(self) -> None:
        """As `close`, without waiting for what has been written to be sent."""
        self.close()
        self._transport.abort()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    # ---- receiving ----

    def data_received(self, data: bytes) -> None:
        """Every frame in it was read now."""
        if self._broken:
            return
        try:
            self._keepalive.heard = True
            self._receiver.feed(data, time.monotonic_ns())
        except BrokenProtocolError as error:
            text = f"the server broke HTTP/2: {error}"
            if not self.ready.done():
                text = f"the server does not speak HTTP/2: {error}"
            self._shut(error.code, StreamError(text))

    def connection_lost(self, error: Exception | None) -> None:
        """Every stream ends with it."""
        self._stop()
        self._end_all(StreamError(f"the connection was lost: {error or 'closed by the server'}"))
        if not self.closed.done():
            self.closed.set_result(None)

    def _take(self, kind: int, flags: int, stream_id: int, body: bytes, now: int) -> None:
        """Any frame."""
        block = self._receiver.headers
        if block.is_open and kind != frames.CONTINUATION:
            raise BrokenProtocolError(ErrorCode.PROTOCOL_ERROR, "a frame within a header block")
        if kind == frames.DATA:
            self._take_data(flags, stream_id, body, now)
        elif kind == frames.HEADERS:
            self._require_known(stream_id)
            self._take_headers(stream_id, block.begin(stream_id, flags, body), now)
        elif kind == frames.CONTINUATION:
            self._take_headers(stream_id, block.go_on(stream_id, flags, body), now)
        elif kind == frames.SETTINGS:
            self._take_settings(flags, stream_id, body)
        elif not self.ready.done():
            raise BrokenProtocolError(ErrorCode.PROTOCOL_ERROR, "its first frame is not SETTINGS")
        elif kind == frames.PING:
            frames.require_size(len(body) == 8, "PING")
            if not flags & frames.ACK:
                self._answer(frame(frames.PING, frames.ACK, 0, body))
        elif kind == frames.WINDOW_UPDATE:
            self._open_window(stream_id, frames.word(body, "WINDOW_UPDATE"), now)
        elif kind == frames.RST_STREAM:
            self._require_known(stream_id)
            self._was_reset(stream_id, frames.word(body, "RST_STREAM"), now)
        elif kind == frames.GOAWAY:
            self._go_away(body, now)
        elif kind == frames.PUSH_PROMISE:
            raise BrokenProtocolError(ErrorCode.PROTOCOL_ERROR, "a promise that nobody asked for")

    def _require_known(self, stream_id: int) -> None:
        if not stream_id & 1 or stream_id >= self._next_id:
            raise BrokenProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"a frame of stream {stream_id}, which is not open"
            )

    def _take_data(self, flags: int, stream_id: int, body: bytes, now: int) -> None:
        self._require_known(stream_id)
        content = frames.unpadded(body, flags)
        self._receiver.count(stream_id, len(body))
        if (stream := self._streams.get(stream_id)) is None:
            return
        if content:
            stream.sink.on_data(content, now)
        if flags & frames.END_STREAM:
            self._end(stream_id, now)

    def _take_headers(self, stream_id: int, block: tuple[dict[str, str], bool] | None, now: int) -> None:
        if block is None or (stream := self._streams.get(stream_id)) is None:
            return
        headers, ends_stream = block
        if headers.get(":status", "").startswith("1") and not ends_stream:
            return
        if not ends_stream and (stream.headers or ":status" not in headers):
            # An answer has one head: otherwise headers without end could be piled up on a stream.
            self._give_up(stream_id, ErrorCode.PROTOCOL_ERROR, "the server sent headers out of place", now)
            return
        stream.headers.update(headers)
        if ends_stream:
            self._end(stream_id, now)
        else:
            stream.sink.on_headers(headers)

    def _take_settings(self, flags: int, stream_id: int, body: bytes) -> None:
        frames.require_size(not len(body) % 6 and not (flags & frames.ACK and body), "SETTINGS")
        if stream_id:
            raise BrokenProtocolError(ErrorCode.PROTOCOL_ERROR, "settings for a stream")
        if flags & frames.ACK:
            return
        for name, value in frames.SETTING.iter_unpack(body):
            if name == frames.MAX_STREAMS:
                self.max_streams = value
            else:
                self._sender.set(name, value)
        self._answer(frame(frames.SETTINGS, frames.ACK, 0, b""))
        if not self.ready.done():
            self.ready.set_result(None)
        self._sender.flush_all()
        self._on_room()

    def _open_window(self, stream_id: int, size: int, now: int) -> None:
        if not stream_id:
            self._sender.widen(size)
            return
        self._require_known(stream_id)
        if (stream := self._streams.get(stream_id)) is None:
            return
        if not self._sender.widen_stream(stream_id, stream, size):
            self._give_up(stream_id, ErrorCode.FLOW_CONTROL_ERROR, f"a window update by {size}", now)

    def _was_reset(self, stream_id: int, code: int, now: int) -> None:
        name = ErrorCode(code).name if code in ErrorCode._value2member_map_ else "unknown"
        text = f"the server reset the stream, HTTP/2 error {code} ({name})"
        self._fail(stream_id, StreamError(text, code, unprocessed=code == ErrorCode.REFUSED_STREAM), now)

    def _go_away(self, body: bytes, now: int) -> None:
        frames.require_size(len(body) >= 8, "GOAWAY")
        self.is_open = False
        last_id = frames.WORD.unpack_from(body)[0] & frames.LARGEST
        for stream_id in [each for each in self._streams if each > last_id]:
            self._fail(stream_id, StreamError("the server is going away", unprocessed=True), now)
        self._left()

    # ---- ends ----

    def _end(self, stream_id: int, now: int) -> None:
        if (stream := self._streams.pop(stream_id, None)) is None:
            return
        if not stream.ended:
            # The server has answered without waiting for the rest of the request, which nobody is to send now.
            self._write(_reset(stream_id, ErrorCode.NO_ERROR))
        stream.sink.on_end(stream.headers, now, None)
        self._left()

    def _fail(self, stream_id: int, error: StreamError, now: int) -> None:
        if (stream := self._streams.pop(stream_id, None)) is not None:
            stream.sink.on_end(stream.headers, now, error)
            self._left()

    def _give_up(self, stream_id: int, code: ErrorCode, text: str, now: int) -> None:
        """End a stream on which the server did what HTTP/2 does not allow."""
        self._write(_reset(stream_id, code))
        self._fail(stream_id, StreamError(text, code), now)

    def _left(self) -> None:
        """A stream has left. A connection that takes no new ones ends with its last."""
        if not self.is_open and not self._streams and not self._broken:
            self.close()
        else:
            self._on_room()

    def _end_all(self, error: StreamError) -> None:
        now = time.monotonic_ns()
        for stream_id in list(self._streams):
            self._fail(stream_id, error, now)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # whoever waits for it still gets it; nobody need
        self._on_room()

    def _stop(self) -> None:
        self._broken, self.is_open = True, False
        self._receiver.stop()
        self._keepalive.stop()

    def _shut(self, code: ErrorCode, error: StreamError) -> None:
        """End the connection from this side."""
        self._stop()
        self._write(frame(frames.GOAWAY, 0, 0, frames.WORD.pack(0) + frames.WORD.pack(code)))
        self._transport.close()
        self._loop.call_later(_ABORT_S, self._transport.abort)
        self._end_all(error)

    def _answer(self, data: bytes) -> None:
        """Write what a frame of the server calls for. Raises `BrokenProtocolError` if it reads none of it."""
        if self._transport.get_write_buffer_size() > _MAX_UNSENT:
            raise BrokenProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "it asks, and does not read the answers")
        self._write(data)

    def _ping(self) -> bool:
        """Ask for a sign of life if somebody waits for one; says whether it did."""
        if self._streams:
            self._write(frame(frames.PING, 0, 0, b"charonia"))
        return bool(self._streams)

    def _lost_peer(self) -> None:
        self._shut(
            ErrorCode.NO_ERROR, StreamError("the connection was lost: the server does not answer a ping")
        )
        self._transport.abort()


def _reset(stream_id: int, code: ErrorCode) -> bytes:
    return frame(frames.RST_STREAM, 0, stream_id, frames.WORD.pack(code))
