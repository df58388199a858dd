"""Decides what each step computes. Torch-free: plain integers in, plain integers out.

There is no prefill phase and no decode phase: each request's `num_computed_tokens` chases its `num_tokens`, and a step
advances some requests by some tokens under one budget. Chunked prefill, prefix-cache hits, preemption and resumption
are all this one case.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable

from charonia.config import SchedulerConfig
from charonia.core.common_prefix import CommonPrefix
from charonia.core.constraints import Constraints, GrammarBackend
from charonia.core.kv_manager import KVManager
from charonia.core.queue import RunningList, WaitingQueue
from charonia.core.results import ResultReader
from charonia.core.stats import EngineStats
from charonia.core.step import BlockDelta, NewRow, StepPlan, StepResult, TokenMasks
from charonia.core.step_builder import Launched, StepBuilder
from charonia.errors import CharoniaError, ErrorCode, InvalidRequestError, QueueFullError
from charonia.outputs import FinishReason
from charonia.request import EngineRequest, Request, RequestStatus, TokenDelta

MAX_SKIPPED_LONG_PROMPTS = 64
"""Long prompts that short ones behind them may overtake in one step."""


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
        self._waiting = WaitingQueue(config.policy)
        self._running = RunningList(config.policy)
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._deadlines: list[tuple[float, int]] = []
        self._launched: deque[Launched] = deque()
        self._next_step_id = 0
        self._next_order = 0
        self._stats = EngineStats(kv_blocks_total=self._kv.num_usable, block_size=config.block_size)
        self._results = ResultReader(self._kv, self._stats, self._finish)
        self._constraints = Constraints(grammars)
        self._common_prefix = CommonPrefix(self._kv, config.block_size)

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
            self._waiting.push(request)
        else:
            request.status = RequestStatus.COMPILING
            self._constraints.begin(request)
        if data.deadline is not None:
            heapq.heappush(self._deadlines, (data.deadline, data.request_id))

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
        return len(self._waiting) + self._constraints.num_compiling

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
        stats.num_running, stats.num_waiting = len(self._running), self._num_waiting
        stats.kv_blocks_used = kv.num_used
        stats.prefix_cache_queries, stats.prefix_cache_hits = kv.prefix_queries, kv.prefix_hits
        return stats

    # ---- schedule ----

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no request can advance before a result has come."""
        if self._deadlines:
            self._expire()
        if self._constraints.num_compiling:
            self._constraints.take_compiled(self._note_compiled, self._note_uncompiled)
        if self._config.policy == "priority":
            self._yield_to_priority()
        budget = self._config.max_num_batched_tokens
        step = StepBuilder(self._next_step_id, budget)
        preempted = self._stats.preemptions
        self._advance_running(step)
        if self._stats.preemptions == preempted and step.budget > 0:
            self._admit_waiting(step)
        if step.budget == budget:
            return None
        self._next_step_id += 1
        freed, self._freed_rows = self._freed_rows, []
        num_common = self._common_prefix.num_blocks(step, self._running.version)
        launched = step.finish(freed, num_common, self._constraints.any_live)
        self._launched.append(launched)
        plan = launched.plan
        self._stats.note_step(budget - step.budget, len(plan.decode_rows) + len(plan.chunks))
        return plan

    def token_masks(self) -> TokenMasks:
        """What the step planned last may draw in its constrained rows, once all before it have been read."""
        return self._constraints.masks(self._launched[-1], self._note_unfollowable)

    def wait_for_grammars(self, seconds: float) -> None:
        """Wait until a grammar is compiled, at most so long; return at once if none is being compiled."""
        self._constraints.wait(seconds)

    def _note_compiled(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self._waiting.push(request)

    def _note_uncompiled(self, request: Request, error: CharoniaError) -> None:
        self._results.end_with_error(request, FinishReason.ERROR, str(error), error.code)

    def _note_unfollowable(self, request: Request, message: str) -> None:
        self._results.end_with_error(request, FinishReason.ERROR, message, ErrorCode.INVALID_ARG)

    def _expire(self) -> None:
        now = self._clock()
        while (deadline := self.next_deadline) is not None and deadline <= now:
            self.abort(heapq.heappop(self._deadlines)[1], "deadline exceeded")

    def _advance_running(self, step: StepBuilder) -> None:
        # Single tokens first: a long prefill never takes the budget of a decode. There are no more rows than budget.
        step_id, decodes, rows = step.step_id, step.decodes, step.decode_rows
        num_counted, prefills = 0, []
        for request in self._running:
            computed = request.num_computed_tokens + 1
            if computed != request.num_tokens:
                prefills.append(request)
            elif computed < request.schedule_from:
                # The hot path, which leaves all but counting to the few steps that meet `schedule_from`.
                request.num_computed_tokens = computed
                request.num_tokens = computed + 1
                request.last_step_id = step_id
                decodes.append(request)
                rows.append(request.row)
                num_counted += 1
            elif computed < request.max_num_tokens:
                self._advance(step, request, 1)
        step.budget -= num_counted
        for request in prefills:
            wanted = self._wanted(request)
            if self._overlong(step, wanted):
                step.put_off.append(request)
            elif wanted > 0:
                self._advance(step, request, self._chunk(step, wanted))

    def _wanted(self, request: Request) -> int:
        """Tokens that the request could compute now: none once the tokens on their way are its last."""
        if request.status is not RequestStatus.RUNNING or request.num_tokens >= request.max_num_tokens:
            return 0
        return request.num_tokens - request.num_computed_tokens

    def _overlong(self, step: StepBuilder, wanted: int) -> bool:
        """Whether this would be one long prefill too many, as long as others may want the budget."""
        is_long = wanted > self._config.long_prefill_token_threshold
        return is_long and step.num_long >= self._config.max_long_partial_prefills

    def _chunk(self, step: StepBuilder, wanted: int) -> int:
        """How much of `wanted` fits the budget; counts a long prefill."""
        step.num_long += wanted > self._config.long_prefill_token_threshold
        return min(wanted, step.budget)

    def _advance(self, step: StepBuilder, request: Request, num_tokens: int) -> None:
        if num_tokens <= 0:
            return
        blocks = self._grow(request, request.num_computed_tokens + num_tokens, step)
        if blocks is None:
            return
        if blocks:
            step.block_deltas.append(BlockDelta(request.row, blocks))
        self._move_on(step, request, num_tokens)

    def _move_on(self, step: StepBuilder, request: Request, num_tokens: int) -> None:
        """Let the step compute `num_tokens` tokens, whose blocks are there."""
        step.advance(request, num_tokens)
        self._kv.publish(request)
        # A row that never samples keeps off the hot path, even for the last token of its prompt.
        request.schedule_from = (
            0 if request.pools else min(request.max_num_tokens, self._kv.next_event(request))
        )

    def _grow(self, request: Request, num_tokens: int, step: StepBuilder) -> list[int] | None:
        """Blocks for the request, preempting later ones if need be; None if it must wait or was preempted itself."""
        while (blocks := self._kv.grow(request, num_tokens)) is None:
            missing = self._kv.blocks_for(num_tokens) - len(request.block_ids)
            victim = self._running.last
            if victim is None or self._kv.num_reclaimable >= missing or step.holds(victim):
                return None
            self._preempt(victim)
            if victim is request:
                return None
        return blocks

    def _preempt(self, request: Request) -> None:
        self._leave_row(request)
        self._kv.release(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._stats.preemptions += 1
        self._waiting.push(request)

    def _leave_row(self, request: Request) -> None:
        self._running.remove(request)
        self._free_rows.append(request.row)
        self._freed_rows.append(request.row)

    # ---- admission ----

    def _admit_waiting(self, step: StepBuilder) -> None:
        skipped: list[Request] = []
        long: list[Request] = []
        while step.budget > 0 and self._free_rows and len(long) < MAX_SKIPPED_LONG_PROMPTS:
            request = self._waiting.peek()
            if request is None:
                break
            # A preempted request whose last token is still on its way cannot be sent in full yet.
            if request.num_pending_tokens > 0:
                skipped.append(self._waiting.pop())
                continue
            prefix = self._kv.find_prefix(request)
            wanted = len(request.token_ids) - len(prefix) * self._config.block_size
            if self._overlong(step, wanted):
                long.append(self._waiting.pop())
                continue
            if not self._has_room(request, prefix) or (self._config.whole_prompts and wanted > step.budget):
                break
            self._admit(step, self._waiting.pop(), prefix, self._chunk(step, wanted))
        skipped += self._spend_rest(step, long)
        for request in skipped:
            self._waiting.push(request)

    def _spend_rest(self, step: StepBuilder, long: list[Request]) -> list[Request]:
        """Give what nobody else wants to further long prefills, running and waiting; those for which it does not do."""
        preempted = self._stats.preemptions
        for request in step.put_off:
            self._advance(step, request, min(self._wanted(request), step.budget))
        if self._stats.preemptions != preempted:
            return long
        for i, request in enumerate(long):
            # What was found before may have been evicted since, by those that were admitted.
            prefix = self._kv.find_prefix(request)
            if step.budget == 0 or not self._has_room(request, prefix):
                return long[i:]
            wanted = len(request.token_ids) - len(prefix) * self._config.block_size
            self._admit(step, request, prefix, min(wanted, step.budget))
        return []

    def _has_room(self, request: Request, prefix: list[int]) -> bool:
        """Whether a row, and blocks for all known tokens beside the cached prefix, are free."""
        needed = self._kv.blocks_for(request.num_tokens_ahead) - len(prefix)
        return bool(self._free_rows) and self._kv.num_free_beside(prefix) >= needed

    def _yield_to_priority(self) -> None:
        """Preempt requests of lower priority while the next waiting one has no room."""
        request = self._waiting.peek()
        if request is None or request.num_pending_tokens > 0:
            return
        prefix = self._kv.find_prefix(request)
        needed = self._kv.blocks_for(request.num_tokens_ahead) - len(prefix)
        while not self._has_room(request, prefix):
            victim = self._running.last
            if victim is None or victim.data.priority <= request.data.priority:
                return
            if self._free_rows and self._kv.num_reclaimable - len(prefix) >= needed:
                return
            self._preempt(victim)

    def _admit(self, step: StepBuilder, request: Request, prefix: list[int], num_tokens: int) -> None:
        self._kv.admit(request, prefix)
        grown = self._kv.grow(request, request.num_computed_tokens + num_tokens)
        assert grown is not None, "admission checked that the blocks are there"
        request.row = row = self._free_rows.pop()
        request.status = RequestStatus.RUNNING
        if request.scheduled_time is None:
            request.scheduled_time = self._clock()
            request.num_cached_tokens = request.num_computed_tokens
        self._running.add(request)
        data = request.data
        step.new_rows.append(
            NewRow(
                row,
                request.token_ids.copy(),
                request.num_prompt_tokens,
                request.block_ids.copy(),
                request.num_computed_tokens,
                data.sampling,
                data.seed,
                data.stop_token_ids if request.matcher is None else [],
                data.bad_words,
                data.pooling,
            )
        )
        self._move_on(step, request, num_tokens)

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
        if previous is RequestStatus.RUNNING:
            self._leave_row(request)
        elif previous is RequestStatus.WAITING:
            self._waiting.note_left()
        self._constraints.forget(request)
        self._kv.release(request)
        del self._requests[request.request_id]
        finished = self._stats.requests_finished
        finished[reason.value] = finished.get(reason.value, 0) + 1
