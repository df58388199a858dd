"""A lock that is a file, for what one process of several has to do."""

import fcntl
import os
from pathlib import Path


class ExclusiveFile:
    """A lock file that one process holds at a time; the kernel frees it when its holder dies."""

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
            # The holder before may have removed the file between the two calls.
            if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:  # noqa: PTH116
                self._descriptor, descriptor = descriptor, -1
        except OSError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return self._descriptor is not None

    def release(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
