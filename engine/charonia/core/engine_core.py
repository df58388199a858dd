"""The step loop: schedule, launch, wait for the step before, update."""

from collections import deque
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Protocol

from charonia.core.scheduler import Scheduler
from charonia.core.stats import EngineStats
from charonia.core.step import StepPlan, StepResult, TokenMasks
from charonia.errors import ErrorCode
from charonia.request import EngineRequest, TokenDelta

GRAMMAR_WAIT_S = 0.002
"""An engine that waits for nothing but grammars looks for messages so often."""


class PendingStep(Protocol):
    """A step that has been handed to the device."""

    def wait(self) -> StepResult:
        """Block until the step has run; raises what it raised."""


class UndrawnStep(Protocol):
    """A step that has been handed to the device but for its end, the drawing of tokens."""

    def draw(self, masks: TokenMasks) -> PendingStep:
        """Hand over the rest; must come before the next step is launched."""


class Executor(Protocol):
    """Runs steps, in the order in which they are launched."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Hand a step over and return at once."""

    def launch_undrawn(self, plan: StepPlan) -> UndrawnStep:
        """As `launch`, for a plan with `constrained_rows`, up to where their masks are needed."""

    def shutdown(self) -> None:
        """Let launched steps end, and release the device."""


@dataclass(slots=True)
class StepTimes:
    """Where the step loop's time went, in seconds summed over `steps` results.

    wait: for results, while the device works. device: as far as the executor reports it; `device_steps` steps do.
    """

    steps: int = 0
    schedule: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    update: float = 0.0
    device: float = 0.0
    device_steps: int = 0

    def since(self, before: "StepTimes") -> "StepTimes":
        """What has been added since a copy was taken."""
        return StepTimes(
            *(getattr(self, field.name) - getattr(before, field.name) for field in fields(StepTimes))
        )


class EngineCore:
    """One engine: requests in, token deltas out. Single-threaded; the device works beside it.

        step:      N               N+1             N+2
        CPU     schedule launch | schedule launch | wait(N) update(N) schedule launch | wait(N+1) ...
        device  ................ N ............... N+1 ............................... N+2

    With lookahead, step N+1 is launched before the tokens of step N are read; without, each step is read at once.
    A step with constrained rows is launched up to its hidden states; step N is read while they are computed, and only
    then is it known what those rows may draw.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, *, lookahead: int) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._lookahead = lookahead
        self._in_flight: deque[tuple[PendingStep, float]] = deque()
        self.times = StepTimes()

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
        times = self.times
        begin = perf_counter()
        plan = self._scheduler.schedule()
        now = perf_counter()
        times.schedule += now - begin
        if plan is not None:
            begin = now
            if plan.constrained_rows:
                now = self._launch_constrained(plan, begin)
            else:
                self._in_flight.append((self._executor.launch(plan), begin))
                now = perf_counter()
                times.launch += now - begin
        elif not self._in_flight:
            self._scheduler.wait_for_grammars(GRAMMAR_WAIT_S)
        if self._in_flight and (plan is None or len(self._in_flight) > self._lookahead):
            self._read(now)
        return self._scheduler.take_deltas()

    def _launch_constrained(self, plan: StepPlan, begin: float) -> float:
        """Launch, read all steps before, and let the step draw; the time at the end. begin: the time now."""
        undrawn = self._executor.launch_undrawn(plan)
        now = perf_counter()
        self.times.launch += now - begin
        while self._in_flight:
            self._read(now)
            now = perf_counter()
        self._in_flight.append((undrawn.draw(self._scheduler.token_masks()), begin))
        end = perf_counter()
        self.times.launch += end - now
        return end

    def _read(self, begin: float) -> None:
        """Wait for the oldest step in flight, and update the requests."""
        pending, launched_at = self._in_flight.popleft()
        result = pending.wait()
        now = perf_counter()
        self._scheduler.add_step_time(now - launched_at)
        self._scheduler.update(result)
        times = self.times
        times.steps += 1
        times.wait += now - begin
        times.update += perf_counter() - now
        if result.device_seconds is not None:
            times.device += result.device_seconds
            times.device_steps += 1

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return self._scheduler.stats()

    def shutdown(self) -> None:
        """Let the steps in flight end, whatever comes of them, and release the device."""
        self._in_flight.clear()
        self._scheduler.shutdown()
        self._executor.shutdown()
