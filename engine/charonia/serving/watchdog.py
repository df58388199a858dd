"""Signs of life: a status file for those outside, an eye on the owner and on steps that never end."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from charonia.errors import ErrorCode
from charonia.serving.engine_home import EngineDir, EngineState, EngineStatus
from charonia.serving.processes import open_pidfd, wait_for_exit

logger = logging.getLogger("charonia.engine")

BEAT_INTERVAL_S = 1.0
EXIT_OWNER_DIED = 3
EXIT_STEP_HUNG = 4


class Watchdog:
    """A thread beside the step loop. Ends the process when its owner has died, or when a step hangs.

    With the owner, its children among the frontends are ended: the stubs of a server that was killed block for ever in
    calls to it, with their interpreter's lock held, so that nothing inside them can.

    The status goes stale when the interpreter itself is stuck, so that observers notice that too.
    """

    def __init__(
        self, directory: EngineDir, status: EngineStatus, *, owner_pid: int, step_timeout_s: float
    ) -> None:
        self._directory = directory
        self._status = status
        self._step_timeout_s = step_timeout_s
        self._step_started: float | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._dependents: set[int] = set()
        self._owner_pidfd = open_pidfd(owner_pid)
        self._thread = threading.Thread(target=self._run, name="charonia-watchdog", daemon=True)

    def start(self) -> None:
        """Write the first status and begin to watch."""
        self._write()
        self._thread.start()

    def set_state(self, state: EngineState) -> None:
        """Publish a new state at once."""
        with self._lock:
            self._status.state = state
        self._write()

    def fail(self, message: str, code: ErrorCode) -> None:
        """Publish why the engine could not start."""
        with self._lock:
            self._status.error, self._status.error_code = message, code.value
        self.set_state("failed")

    def note_requests(self, count: int) -> None:
        """How many requests there are; goes out with the next beat."""
        self._status.num_requests = count

    def add_dependent(self, pidfd: int) -> None:
        """A process that is to end with the owner."""
        with self._lock:
            self._dependents.add(pidfd)

    def remove_dependent(self, pidfd: int) -> None:
        """To be called before the descriptor is closed; without effect on others."""
        with self._lock:
            self._dependents.discard(pidfd)

    def stop(self) -> None:
        """Stop watching; the status stays as it is."""
        self._stopped = True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Mark a step of the engine."""
        self._step_started = time.monotonic()
        try:
            yield
        finally:
            self._step_started = None

    def _run(self) -> None:
        while not self._stopped:
            if self._owner_pidfd is None or wait_for_exit(self._owner_pidfd, BEAT_INTERVAL_S):
                logger.error("the owner process has died; the engine ends")
                self._end_dependents()
                os._exit(EXIT_OWNER_DIED)
            started = self._step_started
            if started is not None and time.monotonic() - started > self._step_timeout_s:
                logger.critical("a step has run for more than %g s; stacks follow", self._step_timeout_s)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(EXIT_STEP_HUNG)
            if not self._stopped:
                self._write()

    def _end_dependents(self) -> None:
        with self._lock:
            for pidfd in self._dependents:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _write(self) -> None:
        with self._lock:
            try:
                self._directory.write_status(self._status)
            except OSError as error:
                logger.warning("cannot write the status file: %s", error)
