"""Frames of HTTP/2 (RFC 9113): numbers, layout, and what is wrong with one."""

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER = struct.Struct(">IBI")
"""Length (24 bits) and type (8), flags, stream: 9 bytes."""
WORD = struct.Struct(">I")
SETTING = struct.Struct(">HI")

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 3, 4, 5, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED, PRIORITY = 0x8, 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADER_LIST = 1, 2, 3, 4, 5, 6

LARGEST = 2**31 - 1
"""Of window sizes and stream numbers."""
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME = 16_384
"""Longest payload of a frame for a side that has not asked for more."""


class ErrorCode(IntEnum):
    """Why a stream or a connection ended."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class BrokenProtocolError(Exception):
    """The peer sent what HTTP/2 does not allow: the connection cannot go on."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    """A whole frame."""
    return HEADER.pack(len(body) << 8 | kind, flags, stream_id) + body


def header_frames(stream_id: int, block: bytes, max_frame: int) -> bytes:
    """A header block as a HEADERS frame and as many CONTINUATION frames as it takes. The stream stays open."""
    kind, parts = HEADERS, []
    for start in range(0, len(block), max_frame):
        flags = END_HEADERS if start + max_frame >= len(block) else 0
        parts.append(frame(kind, flags, stream_id, block[start : start + max_frame]))
        kind = CONTINUATION
    return b"".join(parts)


def word(body: bytes, what: str) -> int:
    """The one number that a frame holds, without the reserved bit. Raises `BrokenProtocolError`."""
    require_size(len(body) == 4, what)
    number: int = WORD.unpack(body)[0]
    return number & LARGEST


def require_size(fits: bool, what: str) -> None:
    """Raises `BrokenProtocolError` unless a frame is as long as its kind must be."""
    if not fits:
        raise BrokenProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"a {what} frame of a wrong length")


def unpadded(body: bytes, flags: int) -> bytes:
    """The payload without its padding. Raises `BrokenProtocolError`."""
    if not flags & PADDED:
        return body
    require_size(bool(body), "padded")
    if body[0] >= len(body):
        raise BrokenProtocolError(ErrorCode.PROTOCOL_ERROR, "a frame with more padding than payload")
    return body[1 : len(body) - body[0]]
