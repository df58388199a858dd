"""Finding markers in text that arrives in pieces."""

import re
from collections.abc import Sequence


class MarkerFinder:
    """Finds the first of a few markers, and what at the end of the text may still become one."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._any = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
        self._start = re.compile("|".join(re.escape(marker[0]) for marker in markers))
        self._reach = max(map(len, markers)) - 1

    def find(self, text: str, start: int) -> re.Match[str] | None:
        """Return the first marker at or after ``start``."""
        return self._any.search(text, start)

    def safe_end(self, text: str, start: int) -> int:
        """Return where text without a whole marker has to be held back: at what a marker may begin with."""
        candidate = self._start.search(text, max(start, len(text) - self._reach))
        while candidate is not None:
            at = candidate.start()
            if any(marker.startswith(text[at:]) for marker in self._markers):
                return at
            candidate = self._start.search(text, at + 1)
        return len(text)


def may_become(text: str, start: int, marker: str) -> bool:
    """Say whether the rest of ``text`` is a beginning of ``marker``, or begins with all of it."""
    return text.startswith(marker, start) or marker.startswith(text[start:])
