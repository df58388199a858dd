"""Triton's HTTP generate extension: one HTTP request a generation, server-sent events for streams."""

# ruff: noqa: ASYNC109 (a time limit is part of this interface, over every protocol)

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TypeVar

import httpx

from charonia_client.endpoint import Endpoint
from charonia_client.errors import (
    CharoniaClientError,
    InternalServerError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerUnavailableError,
    from_http_status,
    from_message,
    no_server,
)
from charonia_client.metadata import Query, error_text, model_path
from charonia_client.requests import GenerateRequest
from charonia_client.responses import NOT_FINISHED, ModelResponse

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 10.0
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=32)
_NOT_READY = frozenset((400, 503))


class HttpTransport:
    """Implements `Transport`. Disconnecting is what cancels a request, so that each has a connection of its own.

    The server (2.51 at least) notices a disconnect when it sends a response and not before: a request that waits
    for its first token goes on until then, and one that does not stream to its end. gRPC has no such gap.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._url = endpoint.url
        # Proxies named in the environment are not for a model server.
        self._client = httpx.AsyncClient(
            base_url=endpoint.url,
            headers=dict(headers),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=_LIMITS,
            trust_env=False,
        )

    async def responses(self, request: GenerateRequest) -> AsyncGenerator[ModelResponse, None]:
        """See `Transport`."""
        path = model_path(request.model, request.model_version)
        path += "/generate_stream" if request.stream else "/generate"
        body: dict[str, object] = {"id": request.request_id, **request.inputs}
        if request.timeout_us is not None:
            body["timeout"] = request.timeout_us
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    text = error_text(await response.aread())
                    raise from_http_status(response.status_code, text, url=self._url, model=request.model)
                if request.stream:
                    reasons: Sequence[object] = ()
                    async for event in _events(response.aiter_bytes()):
                        answer = self._decode(event, request)
                        reasons = answer.outputs.get("finish_reason", ())
                        yield answer
                    if NOT_FINISHED in reasons:
                        message = "the server closed the stream before the answer was complete"
                        raise ServerUnavailableError(message, url=self._url, model=request.model)
                else:
                    yield self._decode(await response.aread(), request)
        except httpx.HTTPError as error:
            raise self._error(error, request.model) from error

    async def ask(self, query: Query[T], timeout: float | None) -> T:
        """See `Transport`."""
        try:
            response = await self._client.get(query.path, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._error(error, query.model) from error
        if response.status_code == httpx.codes.OK:
            try:
                return query.read_http(response.json() if response.content else None)
            except (KeyError, TypeError, ValueError) as error:
                message = f"the server's answer is not Triton's: {error!r}"
                raise InternalServerError(message, url=self._url, model=query.model) from error
        if query.no is not None and response.status_code in _NOT_READY:
            return query.no
        text = error_text(response.content)
        raise from_http_status(response.status_code, text, url=self._url, model=query.model)

    async def aclose(self) -> None:
        """See `Transport`."""
        await self._client.aclose()

    def _decode(self, body: bytes, request: GenerateRequest) -> ModelResponse:
        try:
            outputs = json.loads(body)
        except ValueError:
            outputs = None
        if not isinstance(outputs, dict):
            shown = body[:200].decode(errors="replace")
            message = f"the server's answer is not a JSON object: {shown!r}"
            raise InternalServerError(message, url=self._url, model=request.model)
        error = outputs.pop("error", None)
        if error is not None:
            raise from_message(str(error), url=self._url, model=request.model)
        outputs.pop("id", None)
        model, version = outputs.pop("model_name", request.model), outputs.pop("model_version", "")
        # A tensor of one element arrives as a scalar.
        lists = {name: value if isinstance(value, list) else [value] for name, value in outputs.items()}
        return ModelResponse(model, version, request.request_id, lists)

    def _error(self, error: httpx.HTTPError, model: str | None) -> CharoniaClientError:
        if self._client.is_closed:
            return RequestCancelledError("the client was closed", url=self._url, model=model)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return no_server(self._url)
        if isinstance(error, httpx.TimeoutException):
            return RequestTimeoutError("the server did not answer in time", url=self._url, model=model)
        return ServerUnavailableError(
            f"the connection broke: {error or type(error).__name__}", url=self._url, model=model
        )


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event.

    Lines end at a newline byte and nowhere else: the text inside may hold any other separator of Unicode.
    """
    buffer = b""
    async for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :]
