"""Several processes that accept from one socket: started, replaced when they die, stopped together."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from types import FrameType

_MAX_EARLY_DEATHS = 3
_EARLY_S = 10.0
_EXTRA_S = 3.0
"""What a worker may take beyond its time to drain before it is killed."""

Work = Callable[[socket.socket], None]


class WorkerGroup:
    """Runs `work(listener)` in `count` processes until SIGINT or SIGTERM.

    work: must be picklable, and must end on SIGTERM within `drain_s`. on_death: told the pid of each that is replaced.
    """

    def __init__(
        self,
        work: Work,
        listener: socket.socket,
        count: int,
        drain_s: float,
        on_death: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._work = work
        self._listener = listener
        self._count = count
        self._drain_s = drain_s
        self._on_death = on_death
        self._stopping = False
        self._early_deaths = 0

    def run(self) -> int:
        """Returns the exit status: 1 if workers kept dying as soon as they had started."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        workers: dict[SpawnProcess, float] = {}
        try:
            while not self._stopping and self._early_deaths <= _MAX_EARLY_DEATHS:
                while len(workers) < self._count:
                    workers[self._start()] = time.monotonic()
                multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=0.5)
                for worker in [worker for worker in workers if not worker.is_alive()]:
                    self._early_deaths += time.monotonic() - workers.pop(worker) < _EARLY_S
                    self._on_death(worker.pid or 0)
        finally:
            self._end(list(workers))
            for number, handler in before.items():
                signal.signal(number, handler)
        if not self._stopping:
            print("charonia-client: the gateway's workers keep dying", file=sys.stderr)
        return 0 if self._stopping else 1

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _start(self) -> SpawnProcess:
        process = self._context.Process(target=_worker, args=(self._work, self._listener, os.getpid()))
        process.start()
        return process

    def _end(self, workers: list[SpawnProcess]) -> None:
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + self._drain_s + _EXTRA_S
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.kill()
            worker.join()


def _worker(work: Work, listener: socket.socket, supervisor: int) -> None:
    """The life of one process; it ends as on SIGTERM when its supervisor is gone."""

    def follow() -> None:
        while os.getppid() == supervisor:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="charonia-gateway-guard", daemon=True).start()
    work(listener)
