"""The asyncio client. The synchronous one runs it on a thread of its own."""

# ruff: noqa: ASYNC109 (a time limit is part of this interface, over every protocol)

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, Self, SupportsIndex, TypeVar, Unpack, overload

from charonia_client import metadata, responses
from charonia_client.endpoint import Endpoint, Protocol
from charonia_client.errors import InternalServerError, RequestTimeoutError, ServerUnavailableError
from charonia_client.grpc_transport import GrpcTransport
from charonia_client.http_transport import HttpTransport
from charonia_client.metadata import ModelMetadata, Query, ServerHealth, ServerMetadata
from charonia_client.requests import (
    DEFAULT_MODEL,
    ChatOptions,
    GenerateRequest,
    Message,
    RequestOptions,
    chat_request,
    text_request,
)
from charonia_client.responses import ModelResponse
from charonia_client.results import GenerateResult, StreamChunk
from charonia_client.transport import Transport

T = TypeVar("T")

_FIRST_RETRY_DELAY_S = 0.1
_MAX_RETRY_DELAY_S = 2.0


class AsyncResponseStream:
    """The chunks of one streaming request: an async iterator, and an async context manager that cancels on
    exit.

    The request is sent when the first chunk is asked for. Leaving the loop early without `aclose` cancels it
    too, as soon as the object is collected.
    """

    def __init__(self, request_id: str, chunks: AsyncGenerator[StreamChunk, None]) -> None:
        self.request_id = request_id
        self._chunks = chunks

    def __aiter__(self) -> Self:
        """Iterate over what is left of the stream."""
        return self

    async def __anext__(self) -> StreamChunk:
        """The next chunk."""
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Cancel the request unless it has ended."""
        await self.aclose()


class AsyncCharoniaClient:
    """Speaks to one Triton server that serves Charonia models, from one event loop and any number of its
    tasks.

    url: ``host:port``, or with a scheme: grpc://, grpcs://, http://, https://. protocol: "grpc" (the default)
    or "http", for a URL without a scheme. headers: sent with every request. retries: how often a request is
    sent again when the server was away or full and nothing of an answer had come; the wait doubles from 0.1 s
    to 2 s, at random between half and all of it. requests_per_stream (gRPC): how many requests share one
    stream at most. A request that is cancelled while others share its stream goes on in the server until
    those have ended, so that 1 makes every cancellation immediate, at the price of one call (about half a
    millisecond of CPU) a request.

    A cancelled task cancels its request; over HTTP the server notices with its next response. Raises ValueError
    for a wrong URL or number.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: Protocol | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 2,
        requests_per_stream: int = 8,
    ) -> None:
        if retries < 0:
            raise ValueError(f"retries must be 0 or more, got {retries}")
        if requests_per_stream < 1:
            raise ValueError(f"requests_per_stream must be at least 1, got {requests_per_stream}")
        endpoint = Endpoint.parse(url, protocol)
        self.url = endpoint.url
        self._retries = retries
        self._closed = False
        self._transport: Transport
        if endpoint.protocol == "grpc":
            self._transport = GrpcTransport(endpoint, headers or {}, requests_per_stream)
        else:
            self._transport = HttpTransport(endpoint, headers or {})

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[SupportsIndex] | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerateResult:
        """Continue a text or token ids and return the whole answer. Keywords: `RequestOptions`."""
        return await self._complete(text_request(prompt, token_ids, options, stream=False, url=self.url))

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[SupportsIndex] | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncResponseStream:
        """Continue a text or token ids and yield the answer as it comes. Keywords: `RequestOptions`."""
        return self._start(text_request(prompt, token_ids, options, stream=True, url=self.url))

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> Coroutine[Any, Any, GenerateResult]: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> AsyncResponseStream: ...

    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> Coroutine[Any, Any, GenerateResult] | AsyncResponseStream:
        """Answer a conversation through the model's own chat template. Keywords: `ChatOptions`.

        ``await client.chat(messages)`` gives the whole answer, ``client.chat(messages, stream=True)`` its
        chunks.
        """
        request = chat_request(messages, options, stream=stream, url=self.url)
        return self._start(request) if stream else self._complete(request)

    async def health(self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0) -> ServerHealth:
        """How the server and a model are. Raises `ServerUnavailableError` if nothing answers."""
        live, ready, model_ready = await asyncio.gather(
            self._ask(metadata.server_live(), timeout),
            self._ask(metadata.server_ready(), timeout),
            self._ask(metadata.model_ready(model), timeout),
        )
        return ServerHealth(live, ready, model, model_ready)

    async def is_ready(self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0) -> bool:
        """Whether requests for `model` would be taken now; False as well if nothing answers."""
        try:
            return await self._ask(metadata.model_ready(model), timeout)
        except (ServerUnavailableError, RequestTimeoutError):
            return False

    async def server_metadata(self, *, timeout: float | None = 5.0) -> ServerMetadata:
        """Name, version and extensions of the server."""
        return await self._ask(metadata.server_metadata(), timeout)

    async def model_metadata(
        self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0
    ) -> ModelMetadata:
        """Versions and tensors of a model. Raises `NotFoundError` if the server does not have it."""
        return await self._ask(metadata.model_metadata(model), timeout)

    async def model_config(
        self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0
    ) -> dict[str, Any]:
        """A model's configuration as the server completed it. Raises `NotFoundError` if the server does not
        have it.
        """
        return await self._ask(metadata.model_config(model), timeout)

    async def aclose(self) -> None:
        """Cancel what is in flight (`RequestCancelledError` there) and free the connections."""
        self._closed = True
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the client."""
        await self.aclose()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")

    async def _ask(self, query: Query[T], timeout: float | None) -> T:
        self._require_open()
        return await self._transport.ask(query, timeout)

    async def _complete(self, request: GenerateRequest) -> GenerateResult:
        async with aclosing(self._responses(request)) as answers:
            return responses.single([answer async for answer in answers], url=self.url, model=request.model)

    def _start(self, request: GenerateRequest) -> AsyncResponseStream:
        return AsyncResponseStream(request.request_id, self._chunks(request))

    async def _chunks(self, request: GenerateRequest) -> AsyncGenerator[StreamChunk, None]:
        received = False
        async with aclosing(self._responses(request)) as answers:
            async for answer in answers:
                received = True
                yield responses.parse(StreamChunk, answer, url=self.url)
        if not received:
            message = "the stream ended without a response"
            raise InternalServerError(message, url=self.url, model=request.model)

    async def _responses(self, request: GenerateRequest) -> AsyncGenerator[ModelResponse, None]:
        """The request's responses, within its time limit, which covers the retries."""
        self._require_open()
        attempts = self._attempts(request)
        if request.timeout is None:
            async with aclosing(attempts):
                async for answer in attempts:
                    yield answer
            return
        end = asyncio.get_running_loop().time() + request.timeout
        async with aclosing(attempts):
            while True:
                try:
                    async with asyncio.timeout_at(end) as limit:
                        answer = await anext(attempts)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not limit.expired():
                        raise
                    message = f"not finished within {request.timeout:g} s; the request was cancelled"
                    raise RequestTimeoutError(message, url=self.url, model=request.model) from None
                yield answer

    async def _attempts(self, request: GenerateRequest) -> AsyncGenerator[ModelResponse, None]:
        """Send the request, and again while the server is away or full, unless some of an answer has come."""
        for attempt in range(self._retries + 1):
            received = False
            try:
                async with aclosing(self._transport.responses(request)) as answers:
                    async for answer in answers:
                        received = True
                        yield answer
                return
            except ServerUnavailableError:
                if received or attempt == self._retries:
                    raise
            delay = min(_FIRST_RETRY_DELAY_S * 2**attempt, _MAX_RETRY_DELAY_S)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
