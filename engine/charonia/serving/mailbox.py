"""A queue between threads that a poller can wait for."""

import contextlib
import os
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Many writers, one reader. `fileno` becomes readable when there is something to take."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signalled = False
        """Set behind the write to the descriptor, never before: a reader that found it unset would poll in vain."""

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._eventfd

    def put(self, item: T) -> None:
        """Add an item and wake the reader."""
        self._items.append(item)
        os.eventfd_write(self._eventfd, 1)
        self._signalled = True

    def take(self) -> list[T]:
        """Everything that the descriptor has told of, oldest first. Costs nothing when that is nothing."""
        if not self._signalled:
            return []
        self._signalled = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        items: list[T] = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def __del__(self) -> None:
        os.close(self._eventfd)
