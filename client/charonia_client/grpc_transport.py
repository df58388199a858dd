"""Triton's gRPC protocol: many requests on few ModelStreamInfer calls."""

# ruff: noqa: ASYNC109 (a time limit is part of this interface, over every protocol)

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from charonia_client import grpc_codec
from charonia_client.endpoint import Endpoint
from charonia_client.errors import (
    CharoniaClientError,
    RequestCancelledError,
    ServerUnavailableError,
    from_grpc_status,
)
from charonia_client.metadata import Query
from charonia_client.multiplex import MultiplexedStream
from charonia_client.requests import GenerateRequest
from charonia_client.responses import ModelResponse

T = TypeVar("T")

# The reconnect back-off is short so that a restarted server is found again at once; gRPC's own grows to two
# minutes. Proxies named in the environment are not for a model server.
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcTransport:
    """Implements `Transport`. A request joins the first call with room; a call that breaks fails its own
    requests only.

    The calls do not ask for gRPC status codes (header ``triton_grpc_error``): with it the first error of any
    request closes the whole call, and servers of release 24.10 crash when a neighbour of that request is
    still answering. Errors therefore come as messages and are typed by their text.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str], requests_per_stream: int) -> None:
        self._endpoint = endpoint
        self._metadata = tuple((name.lower(), value) for name, value in headers.items())
        self._requests_per_stream = requests_per_stream
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._calls: list[_Call] = []

    async def responses(self, request: GenerateRequest) -> AsyncGenerator[ModelResponse, None]:
        """See `Transport`."""
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        sink = inbox.put_nowait
        stream = self._submit(grpc_codec.encode(request), sink)
        try:
            last = False
            while not last:
                message = await inbox.get()
                if isinstance(message, Exception):
                    raise message
                last = grpc_codec.is_last(message)
                response = grpc_codec.decode(message, request, url=self._endpoint.url)
                if response is not None:
                    yield response
        finally:
            stream.release(request.request_id, sink)

    async def ask(self, query: Query[T], timeout: float | None) -> T:
        """See `Transport`."""
        rpc = getattr(self._connected(), query.rpc)
        try:
            return query.read_grpc(await rpc(query.message, metadata=self._metadata, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise self._rpc_error(error, query.model) from error

    async def aclose(self) -> None:
        """See `Transport`."""
        for call in list(self._calls):
            await call.aclose()
        if self._channel is not None:
            await self._channel.close()

    def _connected(self) -> Any:
        """The service stub. Its channel belongs to the running loop and is made on first use."""
        if self._stub is None:
            authority = self._endpoint.authority
            if self._endpoint.secure:
                credentials = grpc.ssl_channel_credentials()
                self._channel = grpc.aio.secure_channel(authority, credentials, options=_CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.insecure_channel(authority, options=_CHANNEL_OPTIONS)
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._stub

    def _submit(self, message: Any, sink: Callable[[Any], None]) -> MultiplexedStream:
        for call in self._calls:
            if call.stream.admit(message, sink):
                return call.stream
        call = _Call(self._connected(), self._metadata, self._requests_per_stream, self._stream_error)
        self._calls.append(call)
        call.reader.add_done_callback(lambda _: self._calls.remove(call))
        call.stream.admit(message, sink)
        return call.stream

    def _stream_error(self, error: grpc.aio.AioRpcError | None, cancelled: bool) -> CharoniaClientError:
        """Why a call ended that still had requests: cancelled here, broken, or closed early by the server."""
        url = self._endpoint.url
        if cancelled:
            return RequestCancelledError("the client was closed", url=url)
        if error is None:
            return ServerUnavailableError(
                "the server closed the stream before the answer was complete", url=url
            )
        return self._rpc_error(error, None)

    def _rpc_error(self, error: grpc.aio.AioRpcError, model: str | None) -> CharoniaClientError:
        return from_grpc_status(error.code().name, error.details() or "", url=self._endpoint.url, model=model)


class _Call:
    """One ModelStreamInfer call: an outbox that feeds it and a task that reads it to its end."""

    def __init__(
        self,
        stub: Any,
        metadata: tuple[tuple[str, str], ...],
        limit: int,
        make_error: Callable[[grpc.aio.AioRpcError | None, bool], CharoniaClientError],
    ) -> None:
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._make_error = make_error
        self._rpc = stub.ModelStreamInfer(self._requests(), metadata=metadata)
        self.stream = MultiplexedStream(limit, self._outbox.put_nowait, self._half_close, self._rpc.cancel)
        self.reader = asyncio.create_task(self._read())

    async def aclose(self) -> None:
        """Cancel the call and wait until its requests have been told."""
        self._rpc.cancel()
        await asyncio.wait([self.reader])

    def _half_close(self) -> None:
        self._outbox.put_nowait(None)

    async def _requests(self) -> AsyncIterator[Any]:
        while (message := await self._outbox.get()) is not None:
            yield message

    async def _read(self) -> None:
        failure: grpc.aio.AioRpcError | None = None
        cancelled = False
        try:
            async for message in self._rpc:
                self.stream.dispatch(message.infer_response.id, message, last=grpc_codec.is_last(message))
        except grpc.aio.AioRpcError as error:
            failure = error
        except asyncio.CancelledError:
            cancelled = True  # by `aclose`, or by the stream itself: then nobody is left to tell
        self._half_close()
        self.stream.fail(lambda: self._make_error(failure, cancelled))
