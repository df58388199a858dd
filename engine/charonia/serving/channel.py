"""Messages over a unix socket that nobody ever waits for: a length of four bytes (little endian), then as many."""

import contextlib
import socket
import struct
import threading
from collections import deque
from pathlib import Path

MAX_MESSAGE_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")
_CHUNK_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 5.0


class Channel:
    """One end of a connection. `send` from any thread; everything else from the one thread that polls it.

    What the peer does not take at once is kept, `num_unsent` bytes of it, until `flush` finds that it does. Once the
    peer is gone, what is sent is dropped, and `closed` turns true when all that it had sent has been received.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = connected
        self._lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()
        self.num_unsent = 0
        self.closed = False

    @classmethod
    def connect(cls, path: Path) -> "Channel":
        """To the listener at a path. Raises `OSError`."""
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connecting.settimeout(_CONNECT_TIMEOUT_S)
            connecting.connect(str(path))
        except OSError:
            connecting.close()
            raise
        return cls(connecting)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    def send(self, message: bytes) -> bool:
        """Send, or keep for `flush`; False if bytes were kept. Raises ValueError past `MAX_MESSAGE_BYTES`."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes is too long")
        data = memoryview(_LENGTH.pack(len(message)) + message)
        with self._lock:
            if not self._unsent:
                data = data[self._offer(data) :]
            if data:
                self._unsent.append(data)
                self.num_unsent += len(data)
            return not self.num_unsent

    def flush(self) -> None:
        """Send what was kept, as far as the peer takes it."""
        with self._lock:
            while self._unsent:
                data = self._unsent[0]
                taken = self._offer(data)
                self.num_unsent -= taken
                if taken < len(data):
                    self._unsent[0] = data[taken:]
                    return
                self._unsent.popleft()

    def _offer(self, data: memoryview) -> int:
        """How many bytes are off our hands."""
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # the peer is gone: `receive` tells

    def receive(self) -> list[bytearray]:
        """The messages that have come; a peer that breaks the format counts as gone."""
        received = self._received
        while not self.closed:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self.closed = not chunk
            received += chunk
            if len(chunk) < _CHUNK_BYTES:
                break
        return self._take_messages()

    def _take_messages(self) -> list[bytearray]:
        received, begin = self._received, 0
        messages: list[bytearray] = []
        while len(received) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, begin)
            end = begin + _LENGTH.size + length
            if length > MAX_MESSAGE_BYTES:
                self.closed = True
            if length > MAX_MESSAGE_BYTES or end > len(received):
                break
            messages.append(received[begin + _LENGTH.size : end])
            begin = end
        del received[:begin]
        return messages

    def close(self) -> None:
        """Give the connection up; the peer still gets what the kernel has taken."""
        self._socket.close()


class Listener:
    """Where channels come from."""

    def __init__(self, path: Path) -> None:
        """path: of the socket, which must not exist."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        self._socket.listen(128)

    def fileno(self) -> int:
        """Readable when somebody has connected."""
        return self._socket.fileno()

    def accept(self) -> list[Channel]:
        """All that have connected since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(Channel(self._socket.accept()[0]))
        return found

    def close(self) -> None:
        """Take no more."""
        self._socket.close()
