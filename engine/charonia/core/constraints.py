"""Sequences that follow a grammar, as far as scheduling goes. What a grammar is, a backend knows.

A request whose grammar is still being compiled waits outside the queue. Afterwards its matcher follows its known
tokens; it lives on the host, so that preemption does not touch it.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from charonia.core.step import TokenMasks
from charonia.core.step_builder import Launched
from charonia.errors import CharoniaError, InvalidRequestError, UnsupportedError
from charonia.request import Matcher, Request
from charonia.structured_params import StructuredOutputsParams


class GrammarBackend(Protocol):
    """Compiles grammars beside the step loop, and computes which tokens they allow."""

    def compile(self, params: StructuredOutputsParams) -> "Future[Matcher]":
        """Begin; the future's exception is a `CharoniaError` where the grammar is at fault. Cancelling it gives up."""

    def fill_masks(
        self, matchers: Sequence[Matcher], suppressed: Sequence[Collection[int]]
    ) -> tuple[memoryview, int]:
        """Masks as in `TokenMasks`, and their words a row. suppressed: tokens that each row may not draw, if any
        other is left to it. A matcher that fails on the way has an error afterwards, and a mask without meaning.
        The words are valid until the next call, before which the step that draws with them has been read.
        """

    def shutdown(self) -> None:
        """Stop compiling."""


class Constraints:
    """The constrained requests of a scheduler."""

    def __init__(self, backend: GrammarBackend | None) -> None:
        self._backend = backend
        self._compiling: dict[int, tuple[Request, Future[Matcher]]] = {}
        self._done: deque[Request] = deque()
        """Requests whose grammars are done, and some that have been forgotten since; filled by any thread."""
        self._num_live = 0
        """Requests that have a matcher and have not ended."""

    @property
    def num_compiling(self) -> int:
        """Requests that wait for their grammars."""
        return len(self._compiling)

    @property
    def any_live(self) -> bool:
        """Whether a step may have constrained rows."""
        return self._num_live > 0

    def check(self, params: StructuredOutputsParams | None) -> None:
        """Raise `UnsupportedError` for a constraint that cannot be had."""
        if params is not None and self._backend is None:
            raise UnsupportedError("structured outputs need a tokenizer, and this engine has none")

    def begin(self, request: Request) -> None:
        """Begin to compile a request's grammar."""
        params = request.data.sampling.structured_outputs
        assert params is not None, "a request without a grammar has nothing to wait for"
        assert self._backend is not None, "`check` comes before"
        future = self._backend.compile(params)
        self._compiling[request.request_id] = (request, future)
        future.add_done_callback(lambda _: self._done.append(request))

    def take_compiled(
        self, admit: Callable[[Request], None], fail: Callable[[Request, CharoniaError], None]
    ) -> None:
        """Hand on the requests whose grammars are done; they are forgotten here first."""
        while self._done:
            request = self._done.popleft()
            waiting, future = self._compiling.get(request.request_id, (None, None))
            if waiting is not request or future is None:
                continue
            error = future.exception()
            if error is None:
                del self._compiling[request.request_id]
                request.matcher = future.result()
                self._num_live += 1
                admit(request)
            elif isinstance(error, CharoniaError):
                fail(request, error)
            else:
                fail(request, InvalidRequestError("structured_outputs: the grammar cannot be compiled"))

    def wait(self, seconds: float) -> None:
        """Wait until a grammar is done, at most so long."""
        futures = [future for _, future in self._compiling.values()]
        if futures:
            wait(futures, timeout=seconds, return_when=FIRST_COMPLETED)

    def forget(self, request: Request) -> None:
        """A request has ended, in whatever state."""
        compiling = self._compiling.pop(request.request_id, None)
        if compiling is not None:
            compiling[1].cancel()
        elif request.matcher is not None:
            self._num_live -= 1
            request.matcher = None

    def masks(self, launched: Launched, fail: Callable[[Request, str], None]) -> TokenMasks:
        """Of the step's constrained rows, less those of requests that have ended. Every token before the step's own
        must be known. fail: is told of requests whose grammars can be followed no further.
        """
        assert self._backend is not None, "matchers come from the backend"
        rows = zip(launched.plan.constrained_rows, launched.constrained, strict=True)
        live = [(row, request, request.matcher) for row, request in rows if request.matcher is not None]
        if not live:
            return TokenMasks([], memoryview(b""), 0)
        matchers = [matcher for _, _, matcher in live]
        words, words_per_row = self._backend.fill_masks(
            matchers, [_suppressed(request, matcher) for _, request, matcher in live]
        )
        for _, request, matcher in live:
            if matcher.error is not None:
                fail(request, matcher.error)
        return TokenMasks([row for row, _, _ in live], words, words_per_row)

    def shutdown(self) -> None:
        """Stop compiling."""
        if self._backend is not None:
            self._backend.shutdown()


def _suppressed(request: Request, matcher: Matcher) -> Collection[int]:
    """Tokens that would end the output before it may; they come where the grammar leaves no other."""
    sampling = request.data.sampling
    if request.num_output_tokens < sampling.min_tokens:
        return request.stop_token_ids.union(matcher.end_token_ids)
    return matcher.end_token_ids if sampling.ignore_eos else ()
