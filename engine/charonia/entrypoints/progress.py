"""Says on a terminal, or in a log file, that something is under way and for how long."""

import time
from typing import TextIO

_PLAIN_INTERVAL_S = 10.0


class Progress:
    """A line with elapsed time: rewritten in place on a terminal, repeated every 10 s elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._text = ""
        self._started = self._said = 0.0

    def begin(self, text: str) -> None:
        """Start to tell of `text`."""
        self.end()
        self._text, self._started = text, time.monotonic()
        self._said = self._started
        self._write(f"{text} ...", "" if self._on_terminal else "\n")

    def update(self) -> None:
        """Tell, every so often, how long it has taken so far; nothing outside begin and end."""
        now = time.monotonic()
        if not self._text or now - self._said < (0.1 if self._on_terminal else _PLAIN_INTERVAL_S):
            return
        self._said = now
        if self._on_terminal:
            self._write(f"\r{self._text} ... {now - self._started:.1f} s", "")
        else:
            self._write(f"{self._text} ... {now - self._started:.0f} s", "\n")

    def end(self) -> float:
        """Stop telling; returns how long it took, in seconds."""
        if not self._text:
            return 0.0
        self._text = ""
        if self._on_terminal:
            self._write("\r\033[K", "")
        return time.monotonic() - self._started

    def say(self, line: str) -> None:
        """Print a line of its own, whatever is under way."""
        self._write(f"\r\033[K{line}" if self._text and self._on_terminal else line, "\n")

    def _write(self, text: str, end: str) -> None:
        print(text, end=end, file=self._stream, flush=True)
