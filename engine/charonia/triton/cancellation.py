"""Finding out that clients have gone. Triton does not tell: the model has to ask, request by request."""

import threading
import time
from collections.abc import Callable, Iterable

from charonia.triton.live_request import LiveRequest

MIN_PAUSE_S, MAX_PAUSE_S = 0.05, 0.1
"""From the end of one sweep to the start of the next. A sweep takes 60 to 85 microseconds per live request; the pause
grows with it, so that up to 150 requests cost a tenth of a core at most."""
_PAUSE_PER_SWEEP = 9.0


class CancellationSweeper:
    """A thread that asks `is_cancelled()` for every live request, whatever its state.

    live: the live requests at this moment. on_cancelled: called on this thread, once per request.
    """

    def __init__(
        self, live: Callable[[], Iterable[LiveRequest]], on_cancelled: Callable[[LiveRequest], None],
        on_failure: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._live = live
        self._on_cancelled = on_cancelled
        self._on_failure = on_failure
        self._stopped = threading.Event()
        self._has_work = threading.Event()
        self._thread = threading.Thread(target=self._run, name="charonia-cancel-sweeper", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """A request has become live: the thread sleeps while there is none."""
        self._has_work.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._has_work.set()
        self._thread.join()

    def _run(self) -> None:
        pause = MIN_PAUSE_S
        while True:
            self._has_work.wait()
            if self._stopped.wait(pause):
                return
            begin = time.monotonic()
            # Cleared first, so that a request admitted during the sweep is not missed.
            self._has_work.clear()
            for request in self._live():
                self._has_work.set()
                self._poll(request)
            pause = min(MAX_PAUSE_S, max(MIN_PAUSE_S, _PAUSE_PER_SWEEP * (time.monotonic() - begin)))

    def _poll(self, request: LiveRequest) -> None:
        try:
            if request.poll_cancelled():
                self._on_cancelled(request)
        except Exception as error:
            self._on_failure(f"request {request.name}: cannot tell whether it was cancelled: {error!r}")
            time.sleep(MIN_PAUSE_S)
