"""A process that generates load: it runs plans that come through a pipe and answers with records."""

import asyncio
import gc
import signal
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from charonia.entrypoints.bench.serve.http_backends import Http1Backend
from charonia.entrypoints.bench.serve.records import Records, RequestRecord
from charonia.entrypoints.bench.serve.target import Backend, BenchError, Target
from charonia.entrypoints.bench.serve.triton_grpc import TritonGrpcBackend
from charonia.entrypoints.bench.serve.workload import BenchRequest

INTERRUPTED = "not finished when the run was interrupted"
_CONNECT_TIMEOUT_S = 10.0
_PROGRESS_INTERVAL_S = 0.2
_WATCH_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """One worker's share of a run.

    indices: of its requests in the whole run. arrivals: seconds after the start, ascending.
    concurrency: its requests in flight at most; None: no limit.
    """

    requests: Sequence[BenchRequest]
    indices: Sequence[int]
    arrivals: Sequence[float]
    concurrency: int | None
    warmups: Sequence[BenchRequest]


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker: connected, warm, and waiting for `Start`."""


@dataclass(frozen=True, slots=True)
class Start:
    """Driver: begin at this time of the monotonic clock."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Worker: how many requests have ended."""

    num_ended: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Driver: end now, with what there is."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker: the plan could not be run."""

    message: str


@dataclass(frozen=True, slots=True)
class Done:
    """Worker: the records of its requests, those in flight at a `Stop` included.

    cpu_s, elapsed_s: processor and wall time that generating took. late_ms: how late the process was to wake up, at the
    99th percentile.
    """

    records: Records
    cpu_s: float
    elapsed_s: float
    late_ms: float


def main(pipe: Connection, target: Target) -> None:
    """Run plans until the pipe closes. Ctrl-C is the driver's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            message = pipe.recv()
            if not isinstance(message, Plan):
                continue  # a `Stop` that came after the end
            try:
                asyncio.run(_run(pipe, target, message))
            except BenchError as error:
                pipe.send(Failed(str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


async def _run(pipe: Connection, target: Target, plan: Plan) -> None:
    backend: Backend = TritonGrpcBackend(target) if target.backend == "triton-grpc" else Http1Backend(target)
    generator = LoadGenerator(backend, plan)
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Start | Stop] = asyncio.Queue()
    loop.add_reader(pipe.fileno(), _receive, pipe, inbox, generator)
    try:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await backend.connect(plan.concurrency)
        except OSError as error:  # a timeout too
            raise BenchError(f"cannot connect to {target.authority}: {str(error) or 'no answer'}") from error
        await _warm_up(backend, plan.warmups)
        gc.collect()
        gc.disable()
        pipe.send(Ready())
        message = await inbox.get()
        if isinstance(message, Start):
            cpu, begin = time.process_time(), time.monotonic()
            late_s = array("d", [0.0])
            tasks = [loop.create_task(_report(pipe, generator)), loop.create_task(_note_lateness(late_s))]
            records = await generator.run(message.at_ns)
            for task in tasks:
                task.cancel()
            late_ms = float(np.percentile(late_s, 99)) * 1e3
            pipe.send(Done(records, time.process_time() - cpu, time.monotonic() - begin, late_ms))
        else:
            pipe.send(Failed(INTERRUPTED))
    finally:
        gc.enable()
        loop.remove_reader(pipe.fileno())
        await backend.close()


def _receive(pipe: Connection, inbox: "asyncio.Queue[Start | Stop]", generator: "LoadGenerator") -> None:
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        message = Stop()  # the driver is gone: nobody wants the rest
    if isinstance(message, Stop):
        generator.stop()
        asyncio.get_running_loop().remove_reader(pipe.fileno())
    inbox.put_nowait(message)


async def _report(pipe: Connection, generator: "LoadGenerator") -> None:
    with suppress(OSError):  # the driver is gone: `_receive` hears of it
        while True:
            await asyncio.sleep(_PROGRESS_INTERVAL_S)
            pipe.send(Progress(generator.num_ended))


async def _note_lateness(late_s: "array[float]") -> None:
    """Wake up often and note how late: what arrives meanwhile is read, and its time taken, as much later."""
    while True:
        due = time.monotonic() + _WATCH_INTERVAL_S
        await asyncio.sleep(_WATCH_INTERVAL_S)
        late_s.append(time.monotonic() - due)


async def _warm_up(backend: Backend, requests: Sequence[BenchRequest]) -> None:
    """Send some requests together. Raises `BenchError` if one fails: so would the others."""
    ended: asyncio.Queue[RequestRecord] = asyncio.Queue()
    for i, request in enumerate(requests):
        record = RequestRecord(-1 - i, ended.put_nowait)
        backend.send(backend.encode(request, f"warm-up-{i}"), f"warm-up-{i}", record)
    for _ in requests:
        record = await ended.get()
        if record.error is not None:
            raise BenchError(f"a warm-up request failed: {record.error}")


class LoadGenerator:
    """Sends the requests of a plan, each at its time or as soon as there is room for it."""

    def __init__(self, backend: Backend, plan: Plan) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._limit = plan.concurrency or len(plan.requests)
        self._arrivals = deque(plan.arrivals)
        # Ahead of the clock: encoding a long prompt takes longer than sending it.
        self._payloads = deque(
            (str(index), backend.encode(request, str(index)), request.prompt_tokens, index)
            for index, request in zip(plan.indices, plan.requests, strict=True)
        )
        self._due: deque[int] = deque()
        self._sent: list[RequestRecord] = []
        self._start_ns = 0
        self.num_ended = 0
        self._num_requests = len(plan.requests)
        self._finished: asyncio.Future[None] = self._loop.create_future()

    async def run(self, start_ns: int) -> Records:
        """Begin at that time; returns when every request has ended, or at `stop`."""
        self._start_ns = start_ns
        self._loop.call_at(start_ns / 1e9, self._arrive)
        await self._finished
        return Records.of(self._sent, start_ns)

    def stop(self) -> None:
        """Send nothing more, and wait for nothing."""
        if self._finished.done():
            return
        self._finished.set_result(None)
        now = time.monotonic_ns()
        for record in self._sent:
            record.end(now, INTERRUPTED)

    def _arrive(self) -> None:
        """Requests whose time has come; the timer's own delay counts as delay of the generator."""
        now = time.monotonic_ns()
        while self._arrivals:
            due_ns = self._start_ns + round(self._arrivals[0] * 1e9)
            if due_ns > now:
                self._loop.call_at(due_ns / 1e9, self._arrive)
                break
            self._arrivals.popleft()
            self._due.append(due_ns)
        self._fill()

    def _fill(self) -> None:
        while self._due and len(self._sent) - self.num_ended < self._limit and not self._finished.done():
            request_id, payload, prompt_tokens, index = self._payloads.popleft()
            record = RequestRecord(index, self._on_end, self._due.popleft(), prompt_tokens=prompt_tokens)
            self._sent.append(record)
            self._backend.send(payload, request_id, record)

    def _on_end(self, record: RequestRecord) -> None:
        self.num_ended += 1
        if self.num_ended == self._num_requests and not self._finished.done():
            self._finished.set_result(None)
        else:
            self._fill()
