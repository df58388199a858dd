"""One stream of a connection, and who reads it."""

from typing import Protocol

from charonia_client.http2.frames import ErrorCode


class StreamError(Exception):
    """A stream ended before its end.

    code: what the server gave as the reason; None where the connection was lost. unprocessed: the server has certainly
    not looked at the stream, so that its request may be sent again.
    """

    def __init__(
        self, message: str, code: ErrorCode | int | None = None, *, unprocessed: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.unprocessed = unprocessed


class StreamSink(Protocol):
    """Who reads a stream. Called from the event loop, and never again after `on_end` or a reset."""

    def on_headers(self, headers: dict[str, str]) -> None:
        """The headers of the answer, which come before its body; not its trailers."""

    def on_data(self, data: bytes, now_ns: int) -> None:
        """Part of the body, and when it was read."""

    def on_end(self, headers: dict[str, str], now_ns: int, error: StreamError | None) -> None:
        """The stream is over: every header and trailer that came, and what broke it."""


class Stream:
    """The state of one stream.

    window: bytes that may be sent. pending: bytes that wait for it. closing: no more will be added to them. ended: the
    server has been told so. received: bytes that the server has not been allowed anew. paused: it is not to be allowed
    any.
    """

    __slots__ = ("closing", "ended", "headers", "paused", "pending", "received", "sink", "window")

    def __init__(self, sink: StreamSink, window: int) -> None:
        self.sink = sink
        self.window = window
        self.pending = bytearray()
        self.closing = False
        self.ended = False
        self.received = 0
        self.paused = False
        self.headers: dict[str, str] = {}
