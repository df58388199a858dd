"""Notice a peer that is gone without a word."""

import asyncio
from collections.abc import Callable

_QUIET_S = 310.0
"""gRPC servers allow a ping without data every five minutes, and close connections that ask more often."""
_ANSWER_S = 20.0


class Keepalive:
    """Calls `ping` after a time of silence, and `on_lost` if the silence goes on after it.

    ping: says whether it has asked for an answer. heard: to be set with everything that comes.
    """

    def __init__(
        self,
        ping: Callable[[], bool],
        on_lost: Callable[[], None],
        quiet_s: float = _QUIET_S,
        answer_s: float = _ANSWER_S,
    ) -> None:
        self.heard = False
        self._ping = ping
        self._on_lost = on_lost
        self._quiet_s, self._answer_s = quiet_s, answer_s
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch."""
        self._timer = loop.call_later(self._quiet_s, self._check, loop)

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._asked and not self.heard:
            self._on_lost()
            return
        self._asked = not self.heard and self._ping()
        self.heard = False
        self._timer = loop.call_later(self._answer_s if self._asked else self._quiet_s, self._check, loop)
