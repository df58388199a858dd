"""What comes on a connection: frames cut from the bytes, bodies handed to their streams, and the windows for them."""

from collections.abc import Callable

from charonia_client.http2 import frames
from charonia_client.http2.frames import BrokenProtocolError, ErrorCode, frame
from charonia_client.http2.headers import HeaderReader
from charonia_client.http2.streams import Stream

STREAM_WINDOW = 1 << 20
"""Bytes that a server may send on a stream whose reader has paused."""
CONNECTION_WINDOW = frames.LARGEST
_TOP_UP = STREAM_WINDOW // 2
_CONNECTION_TOP_UP = 2**30
_TOO_LONG = (frames.DEFAULT_FRAME + 1) << 8
_unpack_header = frames.HEADER.unpack_from
TakeFrame = Callable[[int, int, int, bytes, int], None]
"""Takes a frame: kind, flags, stream, body, and when it was read. Raises `BrokenProtocolError`."""


class Receiver:
    """Hands DATA frames without flags to their streams, and every other frame to `take`.

    streams: the connection's, by number. headers: the block that is being put together. rest: the beginning of a frame.
    """

    def __init__(self, streams: dict[int, Stream], write: Callable[[bytes], None], take: TakeFrame) -> None:
        self.headers = HeaderReader()
        self.rest = b""
        self._streams = streams
        self._write = write
        self._take = take
        self._received = 0
        self._stopped = False

    def stop(self) -> None:
        """Read no further, not even what has come."""
        self._stopped = True
        self.rest = b""

    def feed(self, data: bytes, now: int) -> None:
        """Read all frames that are complete. Raises `BrokenProtocolError`."""
        if self.rest:
            data = self.rest + data
        start, size = 0, len(data)
        streams, headers = self._streams, self.headers
        while size - start >= 9:
            word, flags, stream_id = _unpack_header(data, start)
            if word >= _TOO_LONG:
                raise BrokenProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {word >> 8} bytes")
            begin = start + 9
            end = begin + (word >> 8)
            if end > size:
                break
            # The common case first: a kind of 0 is DATA, and without flags there is neither padding nor an end.
            if not word & 0xFF and not flags and not headers.is_open and stream_id in streams:
                stream = streams[stream_id]
                self._received += end - begin
                stream.received += end - begin
                if stream.received > _TOP_UP:
                    self._top_up(stream_id, stream)
                stream.sink.on_data(data[begin:end], now)
            else:
                self._take(word & 0xFF, flags, stream_id & frames.LARGEST, data[begin:end], now)
            if self._stopped:
                return
            start = end
        self.rest = data[start:]
        if self._received > _CONNECTION_TOP_UP:
            self._write(frame(frames.WINDOW_UPDATE, 0, 0, frames.WORD.pack(self._received)))
            self._received = 0

    def count(self, stream_id: int, size: int) -> None:
        """Take DATA that `take` was given off the windows. Raises `BrokenProtocolError`."""
        self._received += size
        if (stream := self._streams.get(stream_id)) is not None:
            stream.received += size
            if stream.received > _TOP_UP:
                self._top_up(stream_id, stream)

    def resume(self, stream_id: int, stream: Stream) -> None:
        """Let a stream that was paused go on."""
        stream.paused = False
        if stream.received:
            self._allow(stream_id, stream)

    def _top_up(self, stream_id: int, stream: Stream) -> None:
        if stream.received > STREAM_WINDOW:
            raise BrokenProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "more data than it was allowed to send")
        if not stream.paused:
            self._allow(stream_id, stream)

    def _allow(self, stream_id: int, stream: Stream) -> None:
        """Have the server send as much again as has come on a stream."""
        self._write(frame(frames.WINDOW_UPDATE, 0, stream_id, frames.WORD.pack(stream.received)))
        stream.received = 0
