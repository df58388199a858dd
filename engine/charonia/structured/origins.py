"""One compiled grammar, as often as its sequences need it to have their masks computed side by side."""

import threading
from collections.abc import Callable
from weakref import WeakSet

from llguidance import LLMatcher

from charonia.structured.matcher import SequenceMatcher

MAX_PER_ORIGIN = 4
"""Sequences beyond which another origin is worth its compiling."""


class Origins:
    """Matchers that have consumed nothing, for sequences to copy. Thread-safe.

    Copies of one origin share its lexer, whose automaton grows as they go, and a lock around it: only the masks of
    sequences of different origins are computed at the same time. So few sequences share what others have found out,
    and many are spread over several origins. They are compiled by the thread that makes this object, and by no other.

    compile_grammar: makes another origin. max_origins: as many as there are threads that compute masks.
    """

    def __init__(
        self, compile_grammar: Callable[[], LLMatcher], end_token_ids: frozenset[int], max_origins: int
    ) -> None:
        self._compile = compile_grammar
        self._end_token_ids = end_token_ids
        self._max_origins = max_origins
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._origins = [compile_grammar()]
        self._live: list[WeakSet[SequenceMatcher]] = [WeakSet()]

    @property
    def is_crowded(self) -> bool:
        """Whether the next sequence should wait for another origin."""
        with self._lock:
            return len(self._origins) < self._max_origins and min(map(len, self._live)) >= MAX_PER_ORIGIN

    def branch(self) -> SequenceMatcher:
        """A matcher of its own for one sequence; in the compiling thread, of a new origin where they are crowded."""
        if threading.get_ident() == self._thread and self.is_crowded:
            origin = self._compile()
            with self._lock:
                self._origins.append(origin)
                self._live.append(WeakSet())
        with self._lock:
            index = min(range(len(self._live)), key=lambda i: len(self._live[i]))
            matcher = SequenceMatcher(self._origins[index].deep_copy(), self._end_token_ids, origin=index)
            self._live[index].add(matcher)
        return matcher
