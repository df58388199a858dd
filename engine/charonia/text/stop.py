"""Stop strings across token boundaries, holding back no more text than could still become one."""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found. text: what to release last, with the stop string if it is to be included."""

    text: str
    stop_string: str


class StopChecker:
    """Looks for stop strings in text that comes in pieces.

    The match that ends first wins. Of several that end at one character the longest wins, so that no part of
    any of them is released; equal strings: the first listed. How the text is cut into pieces makes no
    difference.

    The text held back is always the longest end of the text that begins some stop string. Matching is
    Knuth-Morris-Pratt, one automaton a stop string: at most a few steps a character and stop string, whatever
    they are.
    """

    __slots__ = ("_failures", "_first_chars", "_held", "_include_stop_str", "_matched", "_stops")

    def __init__(self, stop: list[str], include_stop_str: bool = False) -> None:
        """stop: non-empty strings, in order of preference."""
        self._stops = sorted(dict.fromkeys(stop), key=len, reverse=True)
        self._failures = [_failure_function(text) for text in self._stops]
        self._first_chars = frozenset(text[0] for text in self._stops)
        self._include_stop_str = include_stop_str
        self._held = ""
        self._matched = [0] * len(self._stops)
        """Per stop string: how many of its characters the end of the text matches. `_held` is as long as the
        greatest.
        """

    def push(self, text: str, *, armed: bool = True) -> str | StopMatch:
        """Add text. Returns the text that may be released, or the match.

        armed: when false, matches that end within `text` do not count; one that begins in it and ends later
        does.
        """
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        for end, char in enumerate(text, 1):
            for i, stop in enumerate(self._stops):
                if self._advance(i, stop, char) and armed:
                    return self._match(self._held + text[:end], stop)
        buffered = self._held + text
        released = len(buffered) - max(self._matched)
        self._held = buffered[released:]
        return buffered[:released]

    def flush(self) -> str:
        """At the end without a match: the text held back."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, i: int, stop: str, char: str) -> bool:
        """Feed one character to automaton `i`; whether its stop string is complete."""
        matched, failure = self._matched[i], self._failures[i]
        while matched and stop[matched] != char:
            matched = failure[matched - 1]
        if stop[matched] == char:
            matched += 1
        complete = matched == len(stop)
        self._matched[i] = failure[matched - 1] if complete else matched
        return complete

    def _match(self, buffered: str, stop: str) -> StopMatch:
        text = buffered if self._include_stop_str else buffered[: len(buffered) - len(stop)]
        self._held = ""
        self._matched = [0] * len(self._stops)
        return StopMatch(text, stop)


@lru_cache(maxsize=256)
def _failure_function(text: str) -> tuple[int, ...]:
    """For every prefix of `text`, the length of its longest proper prefix that is also its suffix.

    Remembered, as all sequences of a request have the same stop strings.
    """
    failure = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = failure[length - 1]
        if text[i] == text[length]:
            length += 1
        failure[i] = length
    return tuple(failure)
