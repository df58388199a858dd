"""Errors in the form of the OpenAI API, and what becomes of those of the model and of the framework."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from charonia_client.errors import (
    CharoniaClientError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerUnavailableError,
    UnsupportedError,
)
from charonia_client.gateway.context import context_of

logger = logging.getLogger("charonia.gateway")

_RETRY_AFTER_S = {429: 1, 503: 2}
_MAX_MESSAGE_CHARS = 2000

_PARAMETER = re.compile(r"(?:sampling|pooling|request) parameter '(\w+)'")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_disconnected",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_STATUS_BY_ERROR: tuple[tuple[type[CharoniaClientError], int], ...] = (
    (InvalidRequestError, 400),
    (UnsupportedError, 400),
    (NotFoundError, 404),
    (QueueFullError, 429),
    (ModelNotReadyError, 503),
    (RequestCancelledError, 503),
    (RequestTimeoutError, 504),
)


class ErrorDetail(BaseModel):
    """What went wrong. type: its kind, such as "invalid_request_error". param: the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str | int


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An error as the client gets it. status: of HTTP. param: the field of the request that it is about."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The JSON object ``{"error": {...}}``. ASCII, so that whatever a client sent can be quoted in it."""
        error = ErrorDetail(
            message=self.message[:_MAX_MESSAGE_CHARS],
            type=_TYPES.get(self.status, "internal_error"),
            param=self.param,
            code=self.code if self.code is not None else self.status,
        )
        return json.dumps({"error": error.model_dump()}).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The HTTP answer, with Retry-After where trying again makes sense."""
        retry = _RETRY_AFTER_S.get(self.status)
        extra = {} if retry is None else {"retry-after": str(retry)}
        return Response(self.body(), self.status, {**extra, **(headers or {})}, "application/json")


class ClientDisconnectedError(Exception):
    """Nobody waits for the answer any more."""


def as_api_error(error: Exception) -> ApiError:
    """The client's view of any error; what it must not see is left out and should be logged by the caller."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnectedError):
        return ApiError("the client disconnected", status=499)
    if isinstance(error, ServerUnavailableError) and not isinstance(error, QueueFullError):
        # What gRPC tells has addresses in it that are none of the client's business.
        logger.warning("%s", error)
        return ApiError("the model server does not answer; try again later", status=503)
    if isinstance(error, CharoniaClientError):
        for kind, status in _STATUS_BY_ERROR:
            if isinstance(error, kind):
                field = _PARAMETER.match(error.message) if status == 400 else None
                return ApiError(error.message, status=status, param=field and field[1])
        return ApiError(f"the model failed: {error.message}", status=500)
    return ApiError("internal error; the gateway's log has the details", status=500)


def install_error_handlers(app: FastAPI) -> None:
    """Have every error of `app` that is expected answered in the OpenAI form."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    for kind in (ApiError, ClientDisconnectedError, CharoniaClientError):
        app.add_exception_handler(kind, _on_error)


def _on_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    if answer.status == 500:
        logger.error("request %s: %r", context_of(request).request_id, error)
    return answer.response()


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    message = str(error.detail)
    if message == phrase:
        message = f"{phrase}: {request.method} {request.url.path[:200]}"
    return ApiError(message, status=error.status_code).response(error.headers)


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
        return ApiError("the body must be JSON: send it with 'Content-Type: application/json'").response()
    return _validation_error(error.errors(), error.body).response()


def _validation_error(faults: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The fault that tells most about the first wrong field: where a field may have several types, pydantic tells
    what is wrong with the value as any of them.
    """
    first = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    fault = max(
        first, key=lambda fault: (len(fault["loc"]), not fault["type"].endswith(("_type", "_parsing")))
    )
    field = ".".join(_path(fault, body))[:200]
    message = str(fault["msg"]).removeprefix("Value error, ")
    return ApiError(f"{field}: {message}" if field else message, param=field or None)


def _path(fault: Mapping[str, Any], body: Any) -> list[str]:
    """The keys that lead to a fault in the body. Its location has names of types among them."""
    path: list[str] = []
    for part in fault["loc"][1:]:
        inside = (
            part in body if isinstance(body, Mapping) else isinstance(body, list) and isinstance(part, int)
        )
        if inside:
            body = body[part]
        if inside or (fault["type"] == "missing" and part == fault["loc"][-1]):
            path.append(str(part))
    return path
