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
    and many are spread over several origins.

    compile_grammar: makes another origin. may_compile: whether the calling thread is one that may take that long.
    max_origins: as many as there are threads that compute masks. bytes_each: the memory of an origin.
    """

    def __init__(
        self,
        compile_grammar: Callable[[], LLMatcher],
        may_compile: Callable[[], bool],
        end_token_ids: frozenset[int],
        *,
        max_origins: int,
        bytes_each: int = 0,
    ) -> None:
        self._compile = compile_grammar
        self._may_compile = may_compile
        self._end_token_ids = end_token_ids
        self._max_origins = max_origins
        self._bytes_each = bytes_each
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        """Held while another origin is made; other threads do with what there is."""
        self._origins = [compile_grammar()]
        self._live: list[WeakSet[SequenceMatcher]] = [WeakSet()]

    @property
    def num_bytes(self) -> int:
        """Memory of all origins, as far as it is known when they are made."""
        return len(self._origins) * self._bytes_each

    @property
    def is_crowded(self) -> bool:
        """Whether the next sequence should wait for another origin."""
        with self._lock:
            return len(self._origins) < self._max_origins and min(map(len, self._live)) >= MAX_PER_ORIGIN

    def branch(self) -> SequenceMatcher:
        """A matcher of its own for one sequence; of a new origin where they are crowded and this thread may compile."""
        if self._may_compile() and self._compiling.acquire(blocking=False):
            try:
                self._relieve()
            finally:
                self._compiling.release()
        with self._lock:
            index = min(range(len(self._live)), key=lambda i: len(self._live[i]))
            matcher = SequenceMatcher(self._origins[index].deep_copy(), self._end_token_ids, origin=index)
            self._live[index].add(matcher)
        return matcher

    def _relieve(self) -> None:
        if self.is_crowded:
            origin = self._compile()
            with self._lock:
                self._origins.append(origin)
                self._live.append(WeakSet())
