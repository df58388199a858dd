"""Requests in, step plans out; step results in, token deltas out. Torch-free: plain integers throughout.

There is no prefill phase and no decode phase: each request's `num_computed_tokens` chases its `num_tokens`, and a step
advances some requests by some tokens under one budget. Chunked prefill, prefix-cache hits, preemption and resumption
are all this one case.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable

from charonia.config import SchedulerConfig
from charonia.core.constraints import Constraints, GrammarBackend
from charonia.core.kv_manager import KVManager
from charonia.core.planner import StepPlanner
from charonia.core.results import ResultReader
from charonia.core.stats import EngineStats
from charonia.core.step import StepPlan, StepResult, TokenMasks
from charonia.core.step_builder import Launched
from charonia.errors import CharoniaError, ErrorCode, InvalidRequestError, QueueFullError
from charonia.outputs import FinishReason
from charonia.request import EngineRequest, Request, RequestStatus, TokenDelta


class Scheduler:
    """Owns every live request of an engine, and the KV-cache blocks behind them.

    `schedule` may be called again before the result of the step before has come (one-step lookahead): tokens on their
    way count as `num_pending_tokens`, and the device feeds them to the next step itself. `update` takes results in
    the order of the steps.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarBackend | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._kv = KVManager(config)
        self._requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._launched: deque[Launched] = deque()
        self._next_order = 0
        self._stats = EngineStats(kv_blocks_total=self._kv.num_usable, block_size=config.block_size)
        self._planner = StepPlanner(config, self._kv, self._stats, clock)
        self._results = ResultReader(self._kv, self._stats, self._finish)
        self._constraints = Constraints(grammars)

    # ---- requests ----

    def add(self, data: EngineRequest) -> None:
        """Queue a request.

        Raises `QueueFullError`, or `InvalidRequestError` or `UnsupportedError` when it can never run.
        """
        prompt_len, limit = len(data.prompt_token_ids), self._config.max_model_len
        if prompt_len < 1 or data.max_tokens < 1:
            raise InvalidRequestError("a request needs at least one prompt token and one token to generate")
        if prompt_len + (data.max_tokens if data.pooling is None else 0) > limit:
            raise InvalidRequestError(
                f"prompt ({prompt_len} tokens) and max_tokens ({data.max_tokens}) exceed the context length ({limit})"
            )
        if data.request_id in self._requests:
            raise InvalidRequestError(f"request id {data.request_id} is in use")
        constraint = data.sampling.structured_outputs
        self._constraints.check(constraint)
        if self._num_waiting >= self._config.max_waiting_requests:
            self._stats.requests_refused += 1
            raise QueueFullError(
                f"the waiting queue is full ({self._config.max_waiting_requests} requests); retry later"
            )
        request = Request(data)
        request.order = self._next_order
        self._next_order += 1
        self._requests[data.request_id] = request
        if constraint is None:
            self._planner.queue(request)
        else:
            request.status = RequestStatus.COMPILING
            self._constraints.begin(request)
        if data.deadline is not None:
            self._note_deadline(data.deadline, data.request_id)

    def _note_deadline(self, deadline: float, request_id: int) -> None:
        heapq.heappush(self._deadlines, (deadline, request_id))
        if len(self._deadlines) > 2 * len(self._requests) + 64:
            # Mostly of requests that ended long before.
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapq.heapify(self._deadlines)

    def abort(
        self, request_id: int, message: str = "cancelled", code: ErrorCode = ErrorCode.CANCELLED
    ) -> None:
        """End a request in whatever state it is; unknown and finished ones are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._results.end_with_error(request, FinishReason.ABORT, message, code)

    @property
    def _num_waiting(self) -> int:
        """Those whose grammars are being compiled wait too."""
        return self._planner.num_waiting + self._constraints.num_compiling

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting, running or in flight."""
        return bool(self._requests or self._launched or self._results.has_deltas)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request (CLOCK_MONOTONIC)."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_deltas(self) -> list[TokenDelta]:
        """Outputs since the last call, in the order in which they came about."""
        return self._results.take_deltas()

    def add_step_time(self, seconds: float) -> None:
        """Account for a step's time from launch to result."""
        self._stats.step_seconds.observe(seconds)

    def stats(self) -> EngineStats:
        """The current counters and gauges; the caller must not change them."""
        stats, kv = self._stats, self._kv
        stats.num_running, stats.num_waiting = self._planner.num_running, self._num_waiting
        stats.kv_blocks_used = kv.num_used
        stats.prefix_cache_queries, stats.prefix_cache_hits = kv.prefix_queries, kv.prefix_hits
        return stats

    # ---- schedule ----

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no request can advance before a result has come."""
        if self._deadlines:
            self._expire()
        self._constraints.take_compiled(self._planner.queue, self._note_uncompiled)
        launched = self._planner.plan(constrained=self._constraints.any_live)
        if launched is None:
            return None
        self._launched.append(launched)
        return launched.plan

    def token_masks(self) -> TokenMasks:
        """What the step planned last may draw in its constrained rows, once all before it have been read."""
        return self._constraints.masks(self._launched[-1], self._note_unfollowable)

    def wait_for_grammars(self, seconds: float) -> None:
        """Wait until a grammar is compiled, at most so long; return at once if none is being compiled."""
        self._constraints.wait(seconds)

    def _note_uncompiled(self, request: Request, error: CharoniaError) -> None:
        self._results.end_with_error(request, FinishReason.ERROR, str(error), error.code)

    def _note_unfollowable(self, request: Request, message: str) -> None:
        self._results.end_with_error(request, FinishReason.ERROR, message, ErrorCode.INVALID_ARG)

    def _expire(self) -> None:
        now = self._clock()
        while (deadline := self.next_deadline) is not None and deadline <= now:
            self.abort(heapq.heappop(self._deadlines)[1], "deadline exceeded")

    # ---- results ----

    def update(self, result: StepResult) -> None:
        """Take a step's result: append tokens, end requests, return blocks. Results come in the order of the steps."""
        launched = self._launched.popleft()
        assert launched.plan.step_id == result.step_id, "results must come in the order of the steps"
        self._kv.complete(result.step_id)
        self._results.read(launched, result)

    def shutdown(self) -> None:
        """End what goes on beside the step loop."""
        self._constraints.shutdown()

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """The one way out: give back row and blocks, forget the request."""
        previous, request.status = request.status, RequestStatus.FINISHED
        self._planner.take_out(request, previous)
        self._constraints.forget(request)
        self._kv.release(request)
        del self._requests[request.request_id]
        finished = self._stats.requests_finished
        finished[reason.value] = finished.get(reason.value, 0) + 1
