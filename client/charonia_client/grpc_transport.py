"""Triton's gRPC protocol: requests on ModelStreamInfer calls, many or one on each, and questions on calls of their own.

Streams go over the HTTP/2 of this package. Questions are few, and go through the gRPC library.
"""

# ruff: noqa: ASYNC109 (a time limit is part of this interface, over every protocol)

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from charonia_client import grpc_codec, grpc_wire
from charonia_client.endpoint import Endpoint
from charonia_client.errors import CharoniaClientError, RequestCancelledError, from_grpc_status
from charonia_client.grpc_call import GrpcCall, Inbox
from charonia_client.grpc_connections import GrpcConnections
from charonia_client.metadata import Query
from charonia_client.requests import GenerateRequest
from charonia_client.responses import ModelResponse

T = TypeVar("T")

_USER_AGENT = "charonia-client"
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

    Raises ValueError for headers that gRPC cannot send.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str], requests_per_stream: int) -> None:
        self._endpoint = endpoint
        self._metadata = tuple((name.lower(), value) for name, value in headers.items())
        self._requests_per_stream = requests_per_stream
        self._headers = grpc_wire.call_headers(
            grpc_wire.STREAM_INFER_PATH,
            secure=endpoint.secure,
            authority=endpoint.authority,
            metadata=headers,
            user_agent=_USER_AGENT,
        )
        self._connections = GrpcConnections(endpoint)
        self._calls: dict[GrpcCall, None] = {}
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None

    async def responses(self, request: GenerateRequest) -> AsyncGenerator[ModelResponse, None]:
        """See `Transport`."""
        async with aclosing(self.batches(request)) as batches:
            async for batch in batches:
                for response in batch:
                    yield response

    async def batches(self, request: GenerateRequest) -> AsyncGenerator[Sequence[ModelResponse], None]:
        """As `responses`, with all that has come since the last time at once."""
        message = grpc_codec.encode(request)
        inbox = Inbox()
        sink = inbox.put
        call = await self._submit(message, sink)
        try:
            may_send_again, last = True, False
            while not last:
                items = await inbox.take()
                call.taken()
                responses, failure = self._decoded(items, request)
                if may_send_again and not responses and isinstance(failure, grpc_wire.UnprocessedError):
                    may_send_again = False
                    call = await self._submit(message, sink)
                    continue
                may_send_again = False
                last = failure is None and grpc_codec.is_last(items[-1])
                if responses:
                    yield responses
                if failure is not None:
                    raise failure
        finally:
            call.stream.release(request.request_id, sink)

    async def ask(self, query: Query[T], timeout: float | None) -> T:
        """See `Transport`."""
        rpc = getattr(self._connected(), query.rpc)
        try:
            return query.read_grpc(await rpc(query.message, metadata=self._metadata, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise from_grpc_status(
                error.code().name, error.details() or "", url=self._endpoint.url, model=query.model
            ) from error

    async def aclose(self) -> None:
        """See `Transport`."""
        self._closed = True
        for call in list(self._calls):
            call.close()
        await self._connections.aclose()
        if self._channel is not None:
            await self._channel.close()

    def _decoded(
        self, items: Sequence[Any], request: GenerateRequest
    ) -> tuple[list[ModelResponse], CharoniaClientError | None]:
        """The responses in what has come, up to the first failure."""
        responses: list[ModelResponse] = []
        for item in items:
            if isinstance(item, CharoniaClientError):
                return responses, item
            try:
                response = grpc_codec.decode(item, request, url=self._endpoint.url)
            except CharoniaClientError as error:
                return responses, error
            if response is not None:
                responses.append(response)
        return responses, None

    async def _submit(self, message: Any, sink: Callable[[Any], None]) -> GrpcCall:
        """Send a request on a call with room, or on a new one."""
        while True:
            if self._closed:
                raise RequestCancelledError("the client was closed", url=self._endpoint.url)
            if self._requests_per_stream > 1:
                for call in self._calls:
                    if call.admit(message, sink):
                        return call
            if (connection := self._connections.with_room()) is not None:
                break
            await self._connections.wait_for_room()
        call = GrpcCall(
            connection,
            self._headers,
            url=self._endpoint.url,
            max_requests=self._requests_per_stream,
            on_over=self._forget,
        )
        self._calls[call] = None
        call.stream.admit(message, sink)
        return call

    def _forget(self, call: GrpcCall) -> None:
        self._calls.pop(call, None)

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
