"""gRPC over HTTP/2: how messages are framed, what a call's headers are, and how it says that it has ended."""

import re
import struct
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import unquote

from charonia_client.errors import (
    CharoniaClientError,
    InternalServerError,
    RequestCancelledError,
    ServerUnavailableError,
    from_grpc_status,
)
from charonia_client.http2 import ErrorCode, StreamError

MAX_MESSAGE_BYTES = 1 << 30
"""Longest message that is received."""
STREAM_INFER_PATH = "/inference.GRPCInferenceService/ModelStreamInfer"

_PREFIX = struct.Struct(">BI")
"""Whether the message is compressed, its length."""
_PREFIX_SIZE = _PREFIX.size
_STATUS_NAMES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_BY_HTTP_STATUS: Final = {
    "400": "INTERNAL", "401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "UNIMPLEMENTED",
    "429": "UNAVAILABLE", "502": "UNAVAILABLE", "503": "UNAVAILABLE", "504": "UNAVAILABLE",
}  # fmt: skip
_BY_HTTP2_ERROR: Final[dict[int, type[CharoniaClientError]]] = {
    ErrorCode.CANCEL: RequestCancelledError,
    ErrorCode.REFUSED_STREAM: ServerUnavailableError,
    ErrorCode.ENHANCE_YOUR_CALM: ServerUnavailableError,
}
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")


class UnprocessedError(ServerUnavailableError):
    """The server has certainly not looked at the request, which may be sent again at once."""


class MessageReader:
    """Cuts the body of a stream into messages."""

    def __init__(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive
        self._partial = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> None:
        """Hand on the messages that are complete. Raises ValueError for what is none, and what `receive` raises."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return
            data = bytes(self._partial)
            self._partial.clear()
        start, size = 0, len(data)
        while size - start >= _PREFIX_SIZE:
            compressed, length = _PREFIX.unpack_from(data, start)
            if compressed or length > MAX_MESSAGE_BYTES:
                raise ValueError("a compressed message" if compressed else f"a message of {length} bytes")
            end = start + _PREFIX_SIZE + length
            if end > size:
                self._needed = end - start
                break
            self._receive(data[start + _PREFIX_SIZE : end])
            start = end
        else:
            self._needed = _PREFIX_SIZE
        if start < size:
            self._partial += memoryview(data)[start:]


def framed(message: bytes) -> bytes:
    """A message as it travels."""
    return _PREFIX.pack(0, len(message)) + message


def call_headers(
    path: str, *, secure: bool, authority: str, metadata: Mapping[str, str], user_agent: str
) -> tuple[tuple[str, str], ...]:
    """The headers that open a call. Raises ValueError for metadata that cannot be sent."""
    headers = [
        (":method", "POST"), (":scheme", "https" if secure else "http"), (":path", path),
        (":authority", authority), ("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", user_agent),
    ]  # fmt: skip
    for given, value in metadata.items():
        name = given.lower()
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value) or name.endswith("-bin"):
            raise ValueError(f"the header {given!r} cannot be sent: names and values must be plain ASCII")
        headers.append((name, value))
    return tuple(headers)


def is_grpc(headers: Mapping[str, str]) -> bool:
    """Whether the body that follows is gRPC's, and not the page of some other server or proxy."""
    content_type = headers.get("content-type", "")
    return headers.get(":status") == "200" and content_type.startswith("application/grpc")


def end_of_call(headers: Mapping[str, str], error: StreamError | None, *, url: str) -> CharoniaClientError:
    """What requests are told whose call has ended before them. headers: those of the answer, with its trailers."""
    if error is not None:
        if error.unprocessed:
            return UnprocessedError(str(error), url=url)
        kind = ServerUnavailableError
        if error.code is not None:
            return _BY_HTTP2_ERROR.get(error.code, InternalServerError)(str(error), url=url)
        return kind(str(error), url=url)
    details = unquote(headers.get("grpc-message", ""), errors="replace")
    status = headers.get("grpc-status")
    if status is None and headers.get(":status", "200") != "200":
        http_status = headers[":status"]
        name = _BY_HTTP_STATUS.get(http_status, "UNKNOWN")
        return from_grpc_status(
            name, f"the server answered with HTTP status {http_status}", url=url, model=None
        )
    if status in (None, "0"):
        return ServerUnavailableError("the server closed the stream before the answer was complete", url=url)
    known = (
        status is not None and status.isascii() and status.isdigit() and int(status[:4]) < len(_STATUS_NAMES)
    )
    return from_grpc_status(_STATUS_NAMES[int(status)] if known else "UNKNOWN", details, url=url, model=None)
