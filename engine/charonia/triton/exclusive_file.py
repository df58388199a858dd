"""A lock that is a file, for what one process of several has to do."""

import fcntl
import os
from pathlib import Path


class ExclusiveFile:
    """A lock file that one process holds at a time; the kernel frees it when its holder dies.

    Its content is what the holder leaves to the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether this process holds the lock, or has just got it; never waits."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def read(self) -> bytes:
        """What this holder, or the one before, has written last; empty at first. Only for the holder."""
        assert self._descriptor is not None
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, content: bytes) -> None:
        """Replace the content. Only for the holder."""
        assert self._descriptor is not None
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    def release(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
