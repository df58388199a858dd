"""Ctrl-C at a moment that suits."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Within the block, Ctrl-C raises `KeyboardInterrupt` only where the yielded function is called, and at the end.

    A second Ctrl-C raises at once. In threads other than the main one, and where the program handles SIGINT itself,
    nothing changes.
    """
    previous = signal.getsignal(signal.SIGINT)
    pending = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pending
        if pending:
            signal.default_int_handler(signum, frame)
        pending = True

    def check() -> None:
        if pending:
            raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or previous is not signal.default_int_handler
    ):
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
    check()
