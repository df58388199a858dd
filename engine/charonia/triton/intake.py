"""From `execute()` to the engine: parsing and tokenising on a few threads, so that `execute()` returns at once.

A small request that finds nothing waiting is not worth a thread: waking one takes as long as parsing does.
"""

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from charonia.errors import CharoniaError, EngineDeadError, QueueFullError
from charonia.triton.engine import EngineClient
from charonia.triton.inputs import RawRequest, parse_request, parse_utility
from charonia.triton.live_request import LiveRequest
from charonia.triton.pb import AnyArray

_NUM_THREADS = 2
MAX_INLINE_IDS = 1024
MAX_INLINE_BYTES = 1024
"""Largest token list and text that `execute()` takes care of itself: a fraction of a millisecond."""
_NEVER_INLINE = frozenset({"messages", "utility_request"})
"""Inputs whose work does not follow from their size: chat templates are programs."""


class Intake:
    """Parses requests and submits them to the engine.

    max_pending: requests that may wait here; past it they are refused, as they are by the engine's own queue.
    """

    def __init__(
        self,
        engine: EngineClient,
        *,
        max_pending: int,
        ignored_parameters: Collection[str],
        on_unexpected: Callable[[LiveRequest, Exception], None],
    ) -> None:
        self._engine = engine
        self._max_pending = max_pending
        self._ignored_parameters = frozenset(ignored_parameters)
        self._on_unexpected = on_unexpected
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="charonia-intake")
        self._lock = threading.Lock()
        self._inline_lock = threading.Lock()
        """Held while `hand_over` works on a request itself."""
        self._pending = 0
        self._stopped = False

    def hand_over(self, raw: RawRequest, request: LiveRequest) -> None:
        """Take a request; returns at once, its errors go to the request."""
        if not _is_small(raw) or not self._inline_lock.acquire(blocking=False):
            self._take(raw, request, inline=False)
            return
        try:
            self._take(raw, request, inline=True)
        finally:
            self._inline_lock.release()

    def _take(self, raw: RawRequest, request: LiveRequest, *, inline: bool) -> None:
        """inline: whether this thread may do the work, if nothing waits."""
        with self._lock:
            pending = self._pending
            if self._stopped:
                request.on_error(EngineDeadError("the model is being unloaded"))
                return
            if pending >= self._max_pending:
                request.on_error(QueueFullError(f"{pending} requests are waiting already; try again later"))
                return
            if pending or not inline:
                self._pending += 1
                self._pool.submit(self._work_in_turn, raw, request)
                return
        self._work(raw, request)

    def stop(self) -> None:
        """Refuse new requests; return once those taken are with the engine."""
        with self._lock:
            self._stopped = True
        with self._inline_lock:
            pass
        self._pool.shutdown(wait=True)

    def _work_in_turn(self, raw: RawRequest, request: LiveRequest) -> None:
        with self._lock:
            self._pending -= 1
        self._work(raw, request)

    def _work(self, raw: RawRequest, request: LiveRequest) -> None:
        if request.ended:
            return
        try:
            utility = parse_utility(raw)
            if utility is not None:
                request.is_utility = True
                request.answer_utility(self._engine.answer_utility(utility))
                return
            parsed = parse_request(raw, self._ignored_parameters)
            request.start(parsed)
            handle = self._engine.submit(parsed.generation, request)
            if not request.attach(handle):
                self._engine.abort(handle)
        except CharoniaError as error:
            request.on_error(error)
        except Exception as error:
            self._on_unexpected(request, error)
            request.on_error(CharoniaError("internal error; the server's log has the details"))


def _is_small(raw: RawRequest) -> bool:
    """Whether parsing and tokenising take less than a hand-over to another thread and back would be worth."""
    if len(raw.parameters) > MAX_INLINE_BYTES or not _NEVER_INLINE.isdisjoint(raw.inputs):
        return False
    return all(map(_is_small_array, raw.inputs.values()))


def _is_small_array(array: AnyArray) -> bool:
    if array.dtype != np.object_:
        return array.size <= MAX_INLINE_IDS
    return array.size == 1 and len(array.item()) <= MAX_INLINE_BYTES
