"""The step loop: schedule, launch, wait for the step before, update."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from charonia.core.scheduler import Scheduler
from charonia.core.stats import EngineStats
from charonia.core.step import StepPlan, StepResult
from charonia.errors import ErrorCode
from charonia.request import EngineRequest, TokenDelta


class PendingStep(Protocol):
    """A step that has been handed to the device."""

    def wait(self) -> StepResult:
        """Block until the step has run; raises what it raised."""


class Executor(Protocol):
    """Runs steps, in the order in which they are launched."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Hand a step over and return at once."""

    def shutdown(self) -> None:
        """Let launched steps end, and release the device."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    pending: PendingStep
    launched_at: float


class EngineCore:
    """One engine: requests in, token deltas out. Single-threaded; the device works beside it.

        step:      N               N+1             N+2
        CPU     schedule launch | schedule launch | wait(N) update(N) schedule launch | wait(N+1) ...
        device  ................ N ............... N+1 ............................... N+2

    With lookahead, step N+1 is launched before the tokens of step N are read; without, each step is read at once.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, *, lookahead: int) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._lookahead = lookahead
        self._in_flight: deque[_InFlight] = deque()

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises `QueueFullError` or `InvalidRequestError`."""
        self._scheduler.add(request)

    def abort(
        self, request_id: int, message: str = "cancelled", code: ErrorCode = ErrorCode.CANCELLED
    ) -> None:
        """End a request in whatever state it is; a last delta says so. Unknown ids are ignored."""
        self._scheduler.abort(request_id, message, code)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work

    def step(self) -> list[TokenDelta]:
        """Launch the next step if there is one, read the oldest one in flight if it is due, and return what is new."""
        plan = self._scheduler.schedule()
        if plan is not None:
            self._in_flight.append(_InFlight(self._executor.launch(plan), time.monotonic()))
        if self._in_flight and (plan is None or len(self._in_flight) > self._lookahead):
            step = self._in_flight.popleft()
            result = step.pending.wait()
            self._scheduler.add_step_time(time.monotonic() - step.launched_at)
            self._scheduler.update(result)
        return self._scheduler.take_deltas()

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return self._scheduler.stats()

    def shutdown(self) -> None:
        """Let the steps in flight end, whatever comes of them, and release the device."""
        self._in_flight.clear()
        self._executor.shutdown()
