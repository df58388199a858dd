"""Header blocks, which may come in several frames and must be decoded in order, whoever they are for."""

import hpack

from charonia_client.http2.frames import (
    END_HEADERS,
    END_STREAM,
    PRIORITY,
    BrokenProtocolError,
    ErrorCode,
    require_size,
    unpadded,
)

_MAX_BLOCK = 64 << 10
"""Bytes of one header block, compressed or not."""


class HeaderReader:
    """Puts blocks together. is_open: a block has begun, and nothing but its continuation may come."""

    def __init__(self) -> None:
        self.is_open = False
        self._decoder = hpack.Decoder(max_header_list_size=_MAX_BLOCK)
        self._stream_id = 0
        self._ends_stream = False
        self._block = bytearray()

    def begin(self, stream_id: int, flags: int, body: bytes) -> tuple[dict[str, str], bool] | None:
        """A HEADERS frame. Returns the headers and whether they end the stream, once they are complete."""
        body = unpadded(body, flags)
        if flags & PRIORITY:
            require_size(len(body) >= 5, "HEADERS")
            body = body[5:]
        self.is_open, self._stream_id = True, stream_id
        self._ends_stream = bool(flags & END_STREAM)
        self._block.clear()
        return self._add(flags, body)

    def go_on(self, stream_id: int, flags: int, body: bytes) -> tuple[dict[str, str], bool] | None:
        """A CONTINUATION frame."""
        if not self.is_open or stream_id != self._stream_id:
            raise BrokenProtocolError(
                ErrorCode.PROTOCOL_ERROR, "a CONTINUATION frame without its HEADERS frame"
            )
        return self._add(flags, body)

    def _add(self, flags: int, body: bytes) -> tuple[dict[str, str], bool] | None:
        self._block += body
        if len(self._block) > _MAX_BLOCK:
            raise BrokenProtocolError(ErrorCode.ENHANCE_YOUR_CALM, f"headers of more than {_MAX_BLOCK} bytes")
        if not flags & END_HEADERS:
            return None
        self.is_open = False
        try:
            headers = self._decoder.decode(bytes(self._block))
        except (hpack.HPACKError, ValueError, IndexError) as error:
            raise BrokenProtocolError(
                ErrorCode.COMPRESSION_ERROR, f"headers that cannot be read: {error}"
            ) from None
        return {str(name): str(value) for name, value in headers}, self._ends_stream
