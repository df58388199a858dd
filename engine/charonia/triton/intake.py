"""From `execute()` to the engine: parsing and tokenising on a few threads, so that `execute()` returns at once."""

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from charonia.errors import CharoniaError, EngineDeadError, QueueFullError
from charonia.triton.engine import EngineClient
from charonia.triton.inputs import RawRequest, parse_request, parse_utility
from charonia.triton.live_request import LiveRequest

_NUM_THREADS = 2


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
        self._ignored_parameters = ignored_parameters
        self._on_unexpected = on_unexpected
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="charonia-intake")
        self._lock = threading.Lock()
        self._pending = 0
        self._stopped = False

    def hand_over(self, raw: RawRequest, request: LiveRequest) -> None:
        """Take a request; returns at once, its errors go to the request."""
        with self._lock:
            if self._stopped:
                request.on_error(EngineDeadError("the model is being unloaded"))
                return
            if self._pending >= self._max_pending:
                request.on_error(
                    QueueFullError(f"{self._pending} requests are waiting already; try again later")
                )
                return
            self._pending += 1
            self._pool.submit(self._work, raw, request)

    def stop(self) -> None:
        """Refuse new requests; return once those taken are with the engine."""
        with self._lock:
            self._stopped = True
        self._pool.shutdown(wait=True)

    def _work(self, raw: RawRequest, request: LiveRequest) -> None:
        with self._lock:
            self._pending -= 1
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
