"""uvicorn's HTTP protocol with bounds on what a connection may keep without asking for anything."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers; trailers as well, and whatever else stands between two pieces of a body."""

HEAD_TIMEOUT_S = 60.0
"""From the start of a connection or a request to the end of the headers."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 400 and closes when more than `MAX_HEAD_BYTES` have come without a head or a piece of a body, and
    closes when a head takes longer than `HEAD_TIMEOUT_S`.

    The parser itself keeps whatever comes, however long, before any route or key is looked at.
    """

    _unfinished = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        """See `httptools`."""
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See `httptools`."""
        self._unfinished = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See `httptools`."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools`."""
        self._unfinished = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
