"""The errors of the client: one small tree, each error naming the server and the model it is about."""

import re
from typing import Final


class CharoniaClientError(Exception):
    """Base of every error that this package raises on purpose.

    message: what went wrong, without the subject. url: the server the request went to. model: the model asked
    for; None when the error is about the server.
    """

    def __init__(self, message: str, *, url: str, model: str | None = None) -> None:
        self.message: Final = message
        self.url: Final = url
        self.model: Final = model
        super().__init__(f"{message} ({_subject(url, model)})")


class ServerUnavailableError(CharoniaClientError):
    """No server answers, the connection broke, or the server has no room; trying again later may succeed."""


class QueueFullError(ServerUnavailableError):
    """The server works, and has as many requests waiting as it takes."""


class ModelNotReadyError(CharoniaClientError):
    """The server is up, and the model is loading, unloading or failed, or cannot serve the request just now."""


class RequestTimeoutError(CharoniaClientError, TimeoutError):
    """The request's own time limit passed; the request was cancelled."""


class RequestCancelledError(CharoniaClientError):
    """The request was cancelled, here or by the server."""


class RequestFailedError(CharoniaClientError):
    """The server answered with an error. Raised itself where the server's answer does not say of which
    kind.
    """


class InvalidRequestError(RequestFailedError, ValueError):
    """The request is malformed; the message names the field."""


class NotFoundError(RequestFailedError):
    """The model, or something else that the request names, does not exist."""


class UnsupportedError(RequestFailedError):
    """A well-formed request for something that this server or model does not do."""


class InternalServerError(RequestFailedError):
    """The server failed, or answered what it should not."""


def _subject(url: str, model: str | None) -> str:
    return url if model is None else f"model {model!r} at {url}"


def no_server(url: str) -> ServerUnavailableError:
    """The error for an address where nothing listens."""
    return ServerUnavailableError(
        "no Triton server answers; is it running? start one with `make serve` or `charonia serve MODEL`",
        url=url,
    )


_INVALID: Final = InvalidRequestError

_BY_GRPC_STATUS: Final[dict[str, type[CharoniaClientError]]] = {
    "CANCELLED": RequestCancelledError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
    "INTERNAL": InternalServerError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "UNAVAILABLE": ServerUnavailableError,
    "UNIMPLEMENTED": UnsupportedError,
}

_BY_HTTP_STATUS: Final[dict[int, type[CharoniaClientError]]] = {
    404: NotFoundError,
    429: ServerUnavailableError,
    500: InternalServerError,
    501: UnsupportedError,
    502: ServerUnavailableError,
    503: ServerUnavailableError,
    504: RequestTimeoutError,
}

# What Triton and its Python backend say (release 24.10), and what Charonia's model says. First match wins.
_BY_MESSAGE: Final[tuple[tuple[re.Pattern[str], type[CharoniaClientError]], ...]] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"no available versions|not (?:at )?ready|is not healthy", ModelNotReadyError),
        (r"is being unloaded|is shutting down|engine was lost", ModelNotReadyError),
        (r"unknown model|model .* is not found", NotFoundError),
        (r"maximum queue size|queue is full|requests are waiting", QueueFullError),
        (r"^internal error", InternalServerError),
        (r"deadline (?:passed|exceeded)", RequestTimeoutError),
        (r"the request was cancelled", RequestCancelledError),
        (r"(?:is|are) not supported|are supported$|structured outputs are not available", UnsupportedError),
        (
            r"inference input|expected \d+ inputs? but got|[Uu]nable to parse|failed to parse the request",
            _INVALID,
        ),
        (
            r"sampling parameter|^inputs? '|^request parameter|^one of the inputs|^Error generating stream",
            _INVALID,
        ),
        (
            r"^the prompt |^the request parameters|^'\w+' (?:must|cannot)|^\w+(?:\[\d+\])? must|not in the vocabulary",
            _INVALID,
        ),
    )
)


_CODED: Final = re.compile(r"\[([A-Z_]+)\] ")
_BY_CODE: Final[dict[str, type[CharoniaClientError]]] = {
    "INVALID_ARG": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "UNSUPPORTED": UnsupportedError,
    "INTERNAL": InternalServerError,
    "UNAVAILABLE": ModelNotReadyError,
    "CANCELLED": RequestCancelledError,
}
_TOLD_APART_BY_TEXT: Final[dict[type[CharoniaClientError], frozenset[type[CharoniaClientError]]]] = {
    ModelNotReadyError: frozenset({QueueFullError}),
    RequestCancelledError: frozenset({RequestTimeoutError}),
}
"""Kinds that share a code, by the kind that is left when the text tells of no other."""


def from_message(
    message: str, *, url: str, model: str, default: type[CharoniaClientError] = RequestFailedError
) -> CharoniaClientError:
    """Type an error by its text.

    Triton sends the status code of a model's error neither on a gRPC stream nor over HTTP, where every one of
    them is a 400. Charonia's model puts it in front of the text where the request asks for that; otherwise the
    server's own phrases are all there is to go by. `default` is for the rest.
    """
    possible: frozenset[type[CharoniaClientError]] | None = None
    coded = _CODED.match(message)
    if coded is not None and coded[1] in _BY_CODE:
        default = _BY_CODE[coded[1]]
        message = message[coded.end() :]
        possible = _TOLD_APART_BY_TEXT.get(default, frozenset())
    kinds = (kind for pattern, kind in _BY_MESSAGE if pattern.search(message))
    kind = next((kind for kind in kinds if possible is None or kind in possible), default)
    return kind(message, url=url, model=model)


def from_grpc_status(status: str, details: str, *, url: str, model: str | None) -> CharoniaClientError:
    """Type the end of an RPC by the name of its status code."""
    if status == "UNAVAILABLE" and "failed to connect" in details:
        return no_server(url)
    kind = _BY_GRPC_STATUS.get(status, RequestFailedError)
    return kind(f"{details or 'no details'} [{status}]", url=url, model=model)


def from_http_status(status: int, message: str, *, url: str, model: str | None) -> CharoniaClientError:
    """Type an HTTP error answer. A 400 carries any error of the model and is typed by its message."""
    kind = _BY_HTTP_STATUS.get(status, RequestFailedError)
    text = message or f"HTTP status {status}"
    return from_message(text, url=url, model=model, default=kind) if model else kind(text, url=url)
