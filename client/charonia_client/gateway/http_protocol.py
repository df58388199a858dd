"""uvicorn's HTTP protocol with a bound on what it keeps of a request besides the body."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers; trailers as well, and whatever else stands between two pieces of a body."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 400 and closes when more than `MAX_HEAD_BYTES` have come without a head or a piece of a body.

    The parser itself keeps whatever comes, however long, before any route or key is looked at.
    """

    _unfinished = 0

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def on_headers_complete(self) -> None:
        """See `httptools`."""
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See `httptools`."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools`."""
        self._unfinished = 0
        super().on_message_complete()
