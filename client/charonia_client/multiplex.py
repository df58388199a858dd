"""Many requests on one bidirectional call, matched by id. Bookkeeping alone: the call itself is behind three
callbacks.

A shared call has one limit: Triton cannot cancel one request of it. Cancelling the call cancels all of them,
so that a request that is given up while neighbours live runs on in the server, unheard, until the last
neighbour has ended; then the call is cancelled. Such a stream takes no new requests, which bounds the wait by
the neighbours of that moment, and `requests_per_stream` bounds their number. A request that is alone on its
stream is cancelled at once.

A stream without requests is half-closed at once: an idle open call would keep the server from shutting down.
"""

from collections.abc import Callable
from typing import Any

Sink = Callable[[Any], None]
"""Takes each message of one request, or the exception that ended its stream."""


class MultiplexedStream:
    """The requests of one call. Not thread-safe: everything happens on one event loop.

    It admits requests until one is released or none is live; then it closes: the call is cancelled if the
    server still works on a released request, and half-closed and read to its end otherwise.
    """

    def __init__(
        self,
        limit: int,
        send: Callable[[Any], None],
        half_close: Callable[[], None],
        cancel: Callable[[], None],
    ) -> None:
        self._limit = limit
        self._send = send
        self._half_close = half_close
        self._cancel = cancel
        self._live: dict[str, Sink] = {}
        self._released: set[str] = set()
        self._admitting = True

    def admit(self, message: Any, sink: Sink) -> bool:
        """Send a request unless the stream is full, closing, or has its id in use; says whether it was
        sent.
        """
        if not self._admitting or len(self._live) >= self._limit or message.id in self._live:
            return False
        self._live[message.id] = sink
        self._send(message)
        return True

    def dispatch(self, request_id: str, message: Any, *, last: bool) -> None:
        """Hand a message to its request; those of released requests are dropped."""
        sink = self._live.get(request_id)
        if last:
            self._live.pop(request_id, None)
            self._released.discard(request_id)
        if sink is not None:
            sink(message)
            self._close_if_idle()

    def release(self, request_id: str, sink: Sink) -> None:
        """Give up a request; nothing happens if it has ended."""
        if self._live.get(request_id) is not sink:
            return
        del self._live[request_id]
        self._released.add(request_id)
        self._admitting = False
        self._close_if_idle()

    def fail(self, make_error: Callable[[], Exception]) -> None:
        """End every live request with an error of its own: the call is over."""
        self._admitting = False
        sinks, self._live = list(self._live.values()), {}
        for sink in sinks:
            sink(make_error())

    def _close_if_idle(self) -> None:
        if self._live:
            return
        self._admitting = False
        if self._released:
            self._cancel()
        else:
            self._half_close()
