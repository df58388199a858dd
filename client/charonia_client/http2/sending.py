"""What goes out on a connection: headers, and bodies as fast as the server allows."""

from collections.abc import Callable, Iterable

import hpack

from charonia_client.http2 import frames
from charonia_client.http2.frames import BrokenProtocolError, ErrorCode, frame
from charonia_client.http2.streams import Stream, StreamSink


class Sender:
    """Keeps what the server has said about what it takes: windows, frame size, header table.

    streams: the connection's, by number.
    """

    def __init__(self, streams: dict[int, Stream], write: Callable[[bytes], None]) -> None:
        self._streams = streams
        self._write = write
        self._window = self._initial_window = frames.DEFAULT_WINDOW
        self._max_frame = frames.DEFAULT_FRAME
        self._encoder = hpack.Encoder()

    def open(self, stream_id: int, headers: Iterable[tuple[str, str]], sink: StreamSink) -> None:
        """Begin a stream."""
        self._streams[stream_id] = Stream(sink, self._initial_window)
        self._write(frames.header_frames(stream_id, self._encoder.encode(headers), self._max_frame))

    def flush(self, stream_id: int, stream: Stream) -> None:
        """Send what a stream may send now."""
        out = []
        pending = stream.pending
        while pending and (size := min(len(pending), self._max_frame, self._window, stream.window)) > 0:
            stream.ended = stream.closing and size == len(pending)
            flags = frames.END_STREAM if stream.ended else 0
            out.append(frame(frames.DATA, flags, stream_id, bytes(pending[:size])))
            del pending[:size]
            self._window -= size
            stream.window -= size
        if stream.closing and not pending and not stream.ended:
            stream.ended = True
            out.append(frame(frames.DATA, frames.END_STREAM, stream_id, b""))
        if out:
            self._write(b"".join(out))

    def flush_all(self) -> None:
        """Send what every stream may send now."""
        for stream_id, stream in self._streams.items():
            if self._window <= 0:
                return
            if stream.pending:
                self.flush(stream_id, stream)

    def widen(self, size: int) -> None:
        """The server takes more on the connection. Raises `BrokenProtocolError`."""
        self._window += size
        if not size or self._window > frames.LARGEST:
            raise BrokenProtocolError(ErrorCode.FLOW_CONTROL_ERROR, f"a window update by {size}")
        self.flush_all()

    def widen_stream(self, stream_id: int, stream: Stream, size: int) -> bool:
        """The server takes more on a stream; says whether that is possible."""
        stream.window += size
        if not size or stream.window > frames.LARGEST:
            return False
        if stream.pending:
            self.flush(stream_id, stream)
        return True

    def set(self, name: int, value: int) -> None:
        """A setting of the server. Raises `BrokenProtocolError`."""
        if name == frames.INITIAL_WINDOW:
            difference, self._initial_window = value - self._initial_window, value
            largest = max((stream.window for stream in self._streams.values()), default=0)
            if max(value, largest + difference) > frames.LARGEST:
                raise BrokenProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
            for stream in self._streams.values():
                stream.window += difference
        elif name == frames.MAX_FRAME:
            if not frames.DEFAULT_FRAME <= value < 2**24:
                raise BrokenProtocolError(ErrorCode.PROTOCOL_ERROR, f"a maximum frame size of {value}")
            self._max_frame = value
        elif name == frames.HEADER_TABLE_SIZE:
            self._encoder.header_table_size = min(value, 4096)
