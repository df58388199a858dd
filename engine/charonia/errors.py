"""Typed errors. Each carries the code under which every front door (Triton, Python, OpenAI) reports it."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Outcome classes of a failed request; the names are Triton's."""

    INVALID_ARG = "INVALID_ARG"
    NOT_FOUND = "NOT_FOUND"
    UNSUPPORTED = "UNSUPPORTED"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class CharoniaError(Exception):
    """Base of all errors that Charonia raises on purpose. The message is fit for a client to read."""

    code = ErrorCode.INTERNAL


class InvalidRequestError(CharoniaError, ValueError):
    """The request is malformed; the message names the field and what it should have been."""

    code = ErrorCode.INVALID_ARG


class ConfigError(CharoniaError, ValueError):
    """The engine's configuration is wrong; the message names the setting and the mend."""

    code = ErrorCode.INVALID_ARG


class ModelLoadError(CharoniaError):
    """The checkpoint cannot be served: missing, unsupported or malformed."""

    code = ErrorCode.INVALID_ARG


class UnsupportedError(CharoniaError):
    """A well-formed request for something that this build does not do."""

    code = ErrorCode.UNSUPPORTED


class NotFoundError(CharoniaError):
    """A named thing (an adapter, say) does not exist."""

    code = ErrorCode.NOT_FOUND


class QueueFullError(CharoniaError):
    """The bounded waiting queue has no room; the client should back off and retry."""

    code = ErrorCode.UNAVAILABLE


class EngineDeadError(CharoniaError):
    """The engine process is gone, starting, or shutting down."""

    code = ErrorCode.UNAVAILABLE


class RequestCancelledError(CharoniaError):
    """The client cancelled the request."""

    code = ErrorCode.CANCELLED


_BY_CODE: dict[ErrorCode, type[CharoniaError]] = {
    ErrorCode.INVALID_ARG: InvalidRequestError,
    ErrorCode.NOT_FOUND: NotFoundError,
    ErrorCode.UNSUPPORTED: UnsupportedError,
    ErrorCode.UNAVAILABLE: EngineDeadError,
    ErrorCode.CANCELLED: RequestCancelledError,
    ErrorCode.INTERNAL: CharoniaError,
}


def error_from_code(code: ErrorCode, message: str) -> CharoniaError:
    """Rebuild an error that crossed a process boundary as (code, message)."""
    return _BY_CODE[code](message)
