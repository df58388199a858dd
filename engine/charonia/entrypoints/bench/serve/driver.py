"""The processes that generate load, and one run on all of them."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from charonia.entrypoints.bench.serve import worker
from charonia.entrypoints.bench.serve.arrivals import Load
from charonia.entrypoints.bench.serve.records import Floats, Records
from charonia.entrypoints.bench.serve.target import BenchError, Target
from charonia.entrypoints.bench.serve.workload import BenchRequest
from charonia.entrypoints.interrupt import deferred_interrupt

_POLL_S = 0.2
_STOP_TIMEOUT_S = 15.0
_START_DELAY_NS = 50_000_000
"""So that every process has heard of the start when it comes."""


@dataclass(frozen=True, slots=True)
class Run:
    """One point of a measurement: requests in order, and when they arrive in seconds after the start, ascending."""

    load: Load
    requests: Sequence[BenchRequest]
    arrivals: Floats
    warmups: Sequence[BenchRequest]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave.

    cpu_s: of each generating process. elapsed_s: how long they ran. late_ms: how late the slowest of them was to wake
    up, at the 99th percentile.
    """

    records: Records
    cpu_s: tuple[float, ...]
    elapsed_s: float
    late_ms: float
    interrupted: bool

    @property
    def busiest(self) -> float:
        """Share of its time that the busiest process spent computing: near 1 it measured itself."""
        return max(self.cpu_s) / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    num_ended: int = 0


class Fleet:
    """Generating processes, started once and used for every run."""

    def __init__(self, target: Target, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        # Children inherit it: Ctrl-C goes to all processes of a terminal, and is for the driver alone.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=worker.main, args=(theirs, target), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        finally:
            signal.signal(signal.SIGINT, previous)

    def run(
        self,
        run: Run,
        on_ready: Callable[[], None],
        on_progress: Callable[[int], None],
    ) -> Outcome:
        """Send the requests and wait for the answers.

        on_ready: called after the warm-up, before the start. on_progress: called a few times a second with how many
        requests have ended. Ctrl-C ends the run with what there is; a second one raises. Raises `BenchError`.
        """
        most = min(len(run.requests), run.load.concurrency or len(run.requests))
        workers = self._workers[:most]
        for each, plan in zip(workers, shares(run, len(workers)), strict=True):
            each.num_ended = 0
            self._tell(each, plan)
        for each in workers:
            self._hear(each, worker.Ready)
        on_ready()
        start = worker.Start(time.monotonic_ns() + _START_DELAY_NS)
        for each in workers:
            self._tell(each, start)
        done: dict[int, worker.Done] = {}
        interrupted = False
        try:
            with deferred_interrupt() as check:
                self._collect(workers, done, on_progress, check)
        except KeyboardInterrupt:
            interrupted = True
            for each in workers:
                self._tell(each, worker.Stop())
            self._collect(workers, done, on_progress, _deadline(_STOP_TIMEOUT_S))
        results = [done[i] for i in range(len(workers))]
        return Outcome(
            Records.concat([each.records for each in results]),
            tuple(each.cpu_s for each in results),
            max(each.elapsed_s for each in results),
            max(each.late_ms for each in results),
            interrupted,
        )

    def close(self) -> None:
        """End the processes."""
        for each in self._workers:
            each.pipe.close()
        for each in self._workers:
            each.process.join(5)
            if each.process.is_alive():
                each.process.kill()
                each.process.join()

    def _collect(
        self,
        workers: Sequence[_Worker],
        done: dict[int, worker.Done],
        on_progress: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        """Listen until every worker is done, or `check` raises: between messages, never within one."""
        numbers: dict[Any, int] = {each.pipe: i for i, each in enumerate(workers)}
        while len(done) < len(workers):
            check()
            open_pipes = [pipe for pipe, i in numbers.items() if i not in done]
            for pipe in wait(open_pipes, _POLL_S):
                i = numbers[pipe]
                message = self._receive(workers[i])
                if isinstance(message, worker.Progress):
                    workers[i].num_ended = message.num_ended
                elif isinstance(message, worker.Done):
                    workers[i].num_ended = len(message.records)
                    done[i] = message
            on_progress(sum(each.num_ended for each in workers))

    def _hear(self, each: _Worker, kind: type) -> None:
        while not isinstance(self._receive(each), kind):
            pass

    def _tell(self, each: _Worker, message: Any) -> None:
        try:
            each.pipe.send(message)
        except OSError as error:
            raise BenchError(_death(each)) from error

    def _receive(self, each: _Worker) -> Any:
        try:
            message = each.pipe.recv()
        except (EOFError, OSError) as error:
            raise BenchError(_death(each)) from error
        if isinstance(message, worker.Failed):
            raise BenchError(message.message)
        return message


@contextmanager
def fleet(target: Target, num_workers: int) -> Iterator[Fleet]:
    """Processes for as long as the context lasts."""
    workers = Fleet(target, num_workers)
    try:
        yield workers
    finally:
        workers.close()


def shares(run: Run, num_workers: int) -> list[worker.Plan]:
    """Every worker's part: users are dealt to the workers, and requests to users, one by one.

    Warm-up requests go to all workers but at least one each, so that each of them is warm itself.
    """
    users = run.load.concurrency
    owners = [(i if users is None else i % users) % num_workers for i in range(len(run.requests))]
    plans = []
    for number in range(num_workers):
        own = [i for i, owner in enumerate(owners) if owner == number]
        plans.append(
            worker.Plan(
                requests=[run.requests[i] for i in own],
                indices=own,
                arrivals=[float(run.arrivals[i]) for i in own],
                concurrency=None if users is None else len(range(number, users, num_workers)),
                warmups=run.warmups[number::num_workers],
            )
        )
    return plans


def _deadline(seconds: float) -> Callable[[], None]:
    """A check that raises once the time is over."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise BenchError("a load generator does not answer")

    return check


def _death(each: _Worker) -> str:
    each.process.join(1)
    return f"a load generator ended with exit code {each.process.exitcode}"
