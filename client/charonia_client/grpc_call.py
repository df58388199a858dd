"""One ModelStreamInfer call: what comes on its stream, given to the requests that it is for."""

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from charonia_client import grpc_codec, grpc_wire
from charonia_client.errors import CharoniaClientError, InternalServerError, RequestCancelledError
from charonia_client.http2 import Http2Connection, StreamError
from charonia_client.multiplex import MultiplexedStream

_MAX_HELD_BYTES = 256 << 10
"""What may wait for the reader of a call's only request before the server is to wait."""
_parse = service_pb2.ModelStreamInferResponse.FromString


class Inbox:
    """What one request has been sent and has not read. One task reads it."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        """Add a message or an exception."""
        self._items.append(item)
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def take(self) -> list[Any]:
        """All that has come; at least one item, which is awaited."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


class GrpcCall:
    """A call that is open, with its requests in `stream`. Implements `StreamSink`.

    The server has to wait while the reader of a call's only request is slow. On a shared call it never has: one reader
    must not hold up the others, or wait for itself.
    """

    def __init__(
        self,
        connection: Http2Connection,
        headers: tuple[tuple[str, str], ...],
        *,
        url: str,
        max_requests: int,
        on_over: Callable[["GrpcCall"], None],
    ) -> None:
        self.stream = MultiplexedStream(max_requests, self._send, self._half_close, self._cancel)
        self._connection = connection
        self._url = url
        self._on_over = on_over
        self._messages = grpc_wire.MessageReader(self._receive)
        self._shared = max_requests > 1
        self._held = 0
        self._paused = False
        self._is_grpc = False
        self._is_over = False
        self._id = connection.open_stream(headers, self)

    def admit(self, message: Any, sink: Callable[[Any], None]) -> bool:
        """Send a request on the call, see `MultiplexedStream.admit`; not once the server is going away."""
        return self._connection.is_open and self.stream.admit(message, sink)

    def close(self) -> None:
        """Cancel the call; its requests end with `RequestCancelledError`."""
        self._cancel()
        self.stream.fail(lambda: RequestCancelledError("the client was closed", url=self._url))

    def taken(self) -> None:
        """The only reader has taken all that had come."""
        self._held = 0
        if self._paused:
            self._paused = False
            self._connection.resume(self._id)

    # ---- for MultiplexedStream ----

    def _send(self, message: Any) -> None:
        self._connection.send(self._id, grpc_wire.framed(message.SerializeToString()))

    def _half_close(self) -> None:
        self._connection.half_close(self._id)

    def _cancel(self) -> None:
        self._connection.reset(self._id)
        self._over()

    # ---- StreamSink ----

    def on_headers(self, headers: dict[str, str]) -> None:
        """See `StreamSink`."""
        self._is_grpc = grpc_wire.is_grpc(headers)

    def on_data(self, data: bytes, now_ns: int) -> None:
        """See `StreamSink`."""
        if not self._is_grpc:
            return  # whatever it is, the end tells the status
        try:
            self._messages.feed(data)
        except (ValueError, DecodeError) as error:
            text = f"the server sent what cannot be read: {error}"
            self._cancel()
            self.stream.fail(lambda: InternalServerError(text, url=self._url))
            return
        # Only whole messages count: a reader that waits for the rest of one must not have to wait for ever.
        if self._held > _MAX_HELD_BYTES and not self._shared and not self._paused:
            self._paused = True
            self._connection.pause(self._id)

    def on_end(self, headers: dict[str, str], now_ns: int, error: StreamError | None) -> None:
        """See `StreamSink`."""
        self._over()
        self.stream.fail(lambda: self._ended(headers, error))

    def _ended(self, headers: dict[str, str], error: StreamError | None) -> CharoniaClientError:
        return grpc_wire.end_of_call(headers, error, url=self._url)

    def _receive(self, data: bytes) -> None:
        self._held += len(data)
        message = _parse(data)
        self.stream.dispatch(message.infer_response.id, message, last=grpc_codec.is_last(message))

    def _over(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_over(self)
