"""The model in the Triton server, as the routes see it."""

# ruff: noqa: ASYNC109 (a time limit is part of a request to Triton)

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from charonia_client import metadata
from charonia_client.endpoint import Endpoint
from charonia_client.errors import (
    InternalServerError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerUnavailableError,
)
from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.errors import ApiError
from charonia_client.grpc_transport import GrpcTransport
from charonia_client.requests import GenerateRequest, InputValue
from charonia_client.responses import ModelResponse

_ONE_REQUEST_PER_CALL = 1
"""All calls share one HTTP/2 connection. A call of its own lets each request be cancelled at once, which Triton can do
for a call as a whole only."""

_ERROR_CODES = "charonia_error_codes"
"""Request parameter by which errors come with their codes."""

_INFO_SECONDS = 30.0
_MAX_PROMPT_ENDS = 64
_PROBE = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the model tells about itself.

    chat_template: its Jinja source; None where it has none. recommended_sampling: sampling parameters by name.
    """

    max_model_len: int | None
    model_type: str | None
    chat_template: str | None
    created: int
    recommended_sampling: Mapping[str, Any]


class TritonModel:
    """One model of one server, over one connection. Belongs to one event loop.

    Methods raise `CharoniaClientError`, and `ApiError` for what cannot be put into a request.
    """

    def __init__(self, triton: str, model: str, *, timeout_s: float | None = None) -> None:
        """timeout_s: the longest time that a request may take, waiting included. Raises ValueError for the address."""
        endpoint = Endpoint.parse(triton, None)
        if endpoint.protocol != "grpc":
            raise ValueError(f"the gateway speaks gRPC to Triton; {triton!r} is an address for HTTP")
        self.url = endpoint.url
        self.name = model
        self._timeout_s = timeout_s
        self._transport = GrpcTransport(endpoint, {}, _ONE_REQUEST_PER_CALL)
        self._info: ModelInfo | None = None
        self._info_until = 0.0
        self._prompt_ends: OrderedDict[bytes, str] = OrderedDict()

    async def aclose(self) -> None:
        """Cancel what is in flight and free the connection."""
        await self._transport.aclose()

    def request(
        self, inputs: Mapping[str, InputValue], context: RequestContext, *, part: int | None = None
    ) -> GenerateRequest:
        """A request to the model. part: its number, where one request of a client becomes several."""
        request_id = context.request_id if part is None else f"{context.request_id}-{part}"
        return GenerateRequest(
            model=self.name,
            model_version="",
            request_id=request_id,
            inputs=inputs,
            stream=bool(inputs.get("stream")),
            timeout=self._timeout_s,
            parameters={**context.trace, _ERROR_CODES: "true"},
        )

    def batches(self, request: GenerateRequest) -> AsyncGenerator[Sequence[ModelResponse], None]:
        """Send a request and yield its responses, each time all that have come. Closing the generator early cancels the
        request in the server.
        """
        batches = self._transport.batches(request)
        return batches if request.timeout is None else self._limited(batches, request.timeout)

    async def _limited(
        self, batches: AsyncGenerator[Sequence[ModelResponse], None], timeout: float
    ) -> AsyncGenerator[Sequence[ModelResponse], None]:
        async with aclosing(batches):
            end = asyncio.get_running_loop().time() + timeout
            # The limit is set anew for each batch: whoever asks for the next one may be another task.
            while True:
                try:
                    async with asyncio.timeout_at(end) as limit:
                        batch = await anext(batches)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not limit.expired():
                        raise
                    message = f"not finished within {timeout:g} s; the request was cancelled"
                    raise RequestTimeoutError(message, url=self.url, model=self.name) from None
                yield batch

    async def single(self, request: GenerateRequest) -> ModelResponse:
        """Send a request that is answered at once."""
        found: ModelResponse | None = None
        async with aclosing(self.batches(request)) as batches:
            async for batch in batches:
                found = batch[-1]
        if found is None:
            raise InternalServerError("the model sent no answer", url=self.url, model=self.name)
        return found

    async def utility(self, kind: str, body: Mapping[str, Any], context: RequestContext) -> dict[str, Any]:
        """Ask the model what only it can answer: see `utility_request` in the serving contract."""
        inputs = {"utility_request": to_json({kind: body}, "the request")}
        answer = await self.single(self.request(inputs, context))
        try:
            values = json.loads(answer.outputs["text_output"][0])
        except (KeyError, IndexError, ValueError) as error:
            message = f"the model's answer does not follow the serving contract: {error!r}"
            raise InternalServerError(message, url=self.url, model=self.name) from error
        return dict(values)

    async def is_ready(self, timeout: float = 5.0) -> bool:
        """Whether requests would be taken now; False as well if nothing answers."""
        try:
            return await self._transport.ask(metadata.model_ready(self.name), timeout)
        except (ServerUnavailableError, RequestTimeoutError):
            return False

    async def info(self, context: RequestContext) -> ModelInfo:
        """What the model tells about itself, at most half a minute old: a model may be loaded anew.

        A model that does not know the question has nothing to tell.
        """
        if self._info is not None and time.monotonic() < self._info_until:
            return self._info
        try:
            values = await self.utility("model_info", {}, context)
        except InvalidRequestError:
            values = {}
        template = values.get("chat_template")
        created = self._info.created if self._info is not None else int(time.time())
        sampling = values.get("recommended_sampling") or {}
        info = ModelInfo(values.get("max_model_len"), values.get("model_type"), template, created, sampling)
        if self._info is not None and self._info.chat_template != template:
            self._prompt_ends.clear()
        self._info, self._info_until = info, time.monotonic() + _INFO_SECONDS
        return info

    async def prompt_end(self, template_kwargs: Mapping[str, Any], context: RequestContext) -> str:
        """How the chat template opens an answer: the last characters of any prompt for these settings."""
        # A digest: what clients send may be long.
        key = hashlib.sha256(to_json(template_kwargs, "chat_template_kwargs").encode()).digest()
        known = self._prompt_ends.get(key)
        if known is not None:
            self._prompt_ends.move_to_end(key)
            return known
        body = {"messages": _PROBE, "chat_template_kwargs": template_kwargs}
        values = await self.utility("tokenize", body, context)
        end = str(values.get("prompt", ""))[-200:]
        self._prompt_ends[key] = end
        if len(self._prompt_ends) > _MAX_PROMPT_ENDS:
            self._prompt_ends.popitem(last=False)
        return end


def to_json(value: object, what: str) -> str:
    """JSON text for the model. Raises `ApiError`: what a client sent may hold NaN, which JSON does not know."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ApiError(f"{what} cannot be sent as JSON: {error}") from None


def checked_text(text: str, what: str) -> str:
    """`text`, if UTF-8 can express it. Raises `ApiError`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"{what} is not valid Unicode: {error.reason}", param=what) from None
    return text
