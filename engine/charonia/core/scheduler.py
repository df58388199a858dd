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
from charonia.core.kv_manager import KVManager
from charonia.core.queue import RunningList, WaitingQueue
from charonia.core.stats import EngineStats
from charonia.core.step import BlockDelta, NewRow, StepPlan, StepResult
from charonia.core.step_builder import Launched, Share, StepBuilder
from charonia.core.stopping import check_stop
from charonia.errors import ErrorCode, InvalidRequestError, QueueFullError
from charonia.outputs import FinishReason, TokenLogprobs
from charonia.request import EngineRequest, Request, RequestStatus, TokenDelta

MAX_SKIPPED_LONG_PROMPTS = 64
"""Long prompts that short ones behind them may overtake in one step."""


class Scheduler:
    """Owns every live request of an engine, and the KV-cache blocks behind them.

    `schedule` may be called again before the result of the step before has come (one-step lookahead): tokens on their
    way count as `num_pending_tokens`, and the device feeds them to the next step itself. `update` takes results in
    the order of the steps.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
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
        self._deltas: list[TokenDelta] = []
        self._next_step_id = 0
        self._next_order = 0
        self._stats = EngineStats(kv_blocks_total=self._kv.num_usable, block_size=config.block_size)

    # ---- requests ----

    def add(self, data: EngineRequest) -> None:
        """Queue a request. Raises `QueueFullError`, or `InvalidRequestError` when it can never run."""
        prompt_len, limit = len(data.prompt_token_ids), self._config.max_model_len
        if prompt_len < 1 or data.max_tokens < 1:
            raise InvalidRequestError("a request needs at least one prompt token and one token to generate")
        if prompt_len + data.max_tokens > limit:
            raise InvalidRequestError(
                f"prompt ({prompt_len} tokens) and max_tokens ({data.max_tokens}) exceed the context length ({limit})"
            )
        if data.request_id in self._requests:
            raise InvalidRequestError(f"request id {data.request_id} is in use")
        if len(self._waiting) >= self._config.max_waiting_requests:
            self._stats.requests_refused += 1
            raise QueueFullError(
                f"the waiting queue is full ({self._config.max_waiting_requests} requests); retry later"
            )
        request = Request(data)
        request.order = self._next_order
        self._next_order += 1
        self._requests[data.request_id] = request
        self._waiting.push(request)
        if data.deadline is not None:
            heapq.heappush(self._deadlines, (data.deadline, data.request_id))

    def abort(
        self, request_id: int, message: str = "cancelled", code: ErrorCode = ErrorCode.CANCELLED
    ) -> None:
        """End a request in whatever state it is; unknown and finished ones are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end_with_error(request, FinishReason.ABORT, message, code)

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting, running or in flight."""
        return bool(self._requests or self._launched or self._deltas)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request (CLOCK_MONOTONIC)."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_deltas(self) -> list[TokenDelta]:
        """Outputs since the last call, in the order in which they came about."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def add_step_time(self, seconds: float) -> None:
        """Account for a step's time from launch to result."""
        self._stats.step_seconds += seconds

    def stats(self) -> EngineStats:
        """The current counters and gauges; the caller must not change them."""
        stats, kv = self._stats, self._kv
        stats.num_running, stats.num_waiting = len(self._running), len(self._waiting)
        stats.kv_blocks_used = kv.num_used
        stats.prefix_cache_queries, stats.prefix_cache_hits = kv.prefix_queries, kv.prefix_hits
        return stats

    # ---- schedule ----

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no request can advance before a result has come."""
        self._expire()
        if self._config.policy == "priority":
            self._yield_to_priority()
        step = StepBuilder(self._next_step_id, self._config.max_num_batched_tokens)
        preempted = self._stats.preemptions
        self._advance_running(step)
        if self._stats.preemptions == preempted:
            self._admit_waiting(step)
        shares = step.shares
        if not shares:
            return None
        self._next_step_id += 1
        self._launched.append(Launched(step.step_id, shares))
        freed, self._freed_rows = self._freed_rows, []
        plan = StepPlan(
            step.step_id, [share.item for share in shares], step.new_rows, step.block_deltas, freed
        )
        self._stats.steps += 1
        self._stats.scheduled_tokens += plan.num_tokens
        return plan

    def _expire(self) -> None:
        now = self._clock()
        while (deadline := self.next_deadline) is not None and deadline <= now:
            self.abort(heapq.heappop(self._deadlines)[1], "deadline exceeded")

    def _advance_running(self, step: StepBuilder) -> None:
        # Single tokens first: a long prefill never takes the budget of a decode.
        running = self._running.snapshot()
        multi: list[Request] = []
        for request in running:
            wanted = self._wanted(request)
            if wanted == 1:
                self._advance(step, request, 1)
            elif wanted > 1:
                multi.append(request)
        for request in multi:
            wanted = self._wanted(request)
            if wanted > 0 and not self._overlong(step, wanted):
                self._advance(step, request, self._chunk(step, wanted))

    def _wanted(self, request: Request) -> int:
        """Tokens that the request could compute now: none once the tokens on their way are its last."""
        if request.status is not RequestStatus.RUNNING:
            return 0
        if request.num_output_tokens + request.num_pending_tokens >= request.data.max_tokens:
            return 0
        return request.num_tokens - request.num_computed_tokens

    def _overlong(self, step: StepBuilder, wanted: int) -> bool:
        """Whether this would be one long prefill too many for the step."""
        is_long = wanted > self._config.long_prefill_token_threshold
        return is_long and step.num_long >= self._config.max_long_partial_prefills

    def _chunk(self, step: StepBuilder, wanted: int) -> int:
        """How much of `wanted` fits the budget; counts a long prefill."""
        step.num_long += wanted > self._config.long_prefill_token_threshold
        return min(wanted, step.budget)

    def _advance(self, step: StepBuilder, request: Request, num_tokens: int) -> None:
        if num_tokens <= 0 or step.budget < num_tokens:
            return
        blocks = self._grow(request, request.num_computed_tokens + num_tokens, step)
        if blocks is None:
            return
        if blocks:
            assert request.row is not None
            step.block_deltas.append(BlockDelta(request.row, blocks))
        step.advance(request, num_tokens)
        self._kv.publish(request)

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
        assert request.row is not None
        self._running.remove(request)
        self._free_rows.append(request.row)
        self._freed_rows.append(request.row)
        request.row = None

    # ---- admission ----

    def _admit_waiting(self, step: StepBuilder) -> None:
        skipped: list[Request] = []
        while step.budget > 0 and len(skipped) <= MAX_SKIPPED_LONG_PROMPTS:
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
                skipped.append(self._waiting.pop())
                continue
            if not self._has_room(request, prefix):
                break
            self._admit(step, self._waiting.pop(), prefix, self._chunk(step, wanted))
        for request in skipped:
            self._waiting.push(request)

    def _has_room(self, request: Request, prefix: list[int]) -> bool:
        """Whether a row, and blocks for all known tokens beside the cached prefix, are free."""
        needed = self._kv.blocks_for(len(request.token_ids) + 1) - len(prefix)
        return bool(self._free_rows) and self._kv.num_free_beside(prefix) >= needed

    def _yield_to_priority(self) -> None:
        """Preempt requests of lower priority while the next waiting one has no room."""
        request = self._waiting.peek()
        if request is None or request.num_pending_tokens > 0:
            return
        prefix = self._kv.find_prefix(request)
        needed = self._kv.blocks_for(len(request.token_ids) + 1) - len(prefix)
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
        row = self._free_rows.pop()
        request.row, request.status = row, RequestStatus.RUNNING
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
                data.stop_token_ids,
                data.bad_words,
            )
        )
        step.advance(request, num_tokens)
        self._kv.publish(request)

    # ---- results ----

    def update(self, result: StepResult) -> None:
        """Take a step's result: append tokens, end requests, return blocks. Results come in the order of the steps."""
        launched = self._launched.popleft()
        assert launched.step_id == result.step_id, "results must come in the order of the steps"
        self._kv.complete(result.step_id)
        tokens = iter(result.token_ids)
        for share in launched.shares:
            token_id = next(tokens) if share.item.samples else None
            if token_id is not None:
                share.request.num_pending_tokens -= 1
            if not share.request.finished:
                self._apply(share, token_id, result)

    def _apply(self, share: Share, token_id: int | None, result: StepResult) -> None:
        request, row = share.request, share.item.row
        if row in result.failed_rows:
            self._kv.unpublish(request)
            message = "no token can be sampled: the logits are not finite, or every token is excluded"
            self._end_with_error(request, FinishReason.ERROR, message, ErrorCode.INTERNAL)
            return
        prompt_logprobs = self._new_prompt_logprobs(share, result)
        if token_id is None:
            if prompt_logprobs:
                self._deltas.append(
                    TokenDelta(request_id=request.request_id, prompt_logprobs=prompt_logprobs)
                )
            return
        first = request.num_output_tokens == 0
        request.token_ids.append(token_id)
        self._stats.generated_tokens += 1
        stop = check_stop(request)
        if stop is None and request.status is RequestStatus.RUNNING:
            self._kv.publish(request)
        logprobs = result.logprobs.get(row)
        self._deltas.append(
            TokenDelta(
                request_id=request.request_id,
                token_ids=[token_id],
                finish_reason=None if stop is None else stop.reason,
                stop_token_id=None if stop is None else stop.token_id,
                logprobs=None if logprobs is None else [logprobs],
                prompt_logprobs=prompt_logprobs,
                num_cached_tokens=request.num_cached_tokens if first else None,
                scheduled_time=request.scheduled_time if first else None,
            )
        )
        if stop is not None:
            self._finish(request, stop.reason)

    def _new_prompt_logprobs(self, share: Share, result: StepResult) -> list[TokenLogprobs] | None:
        """The step's prompt logprobs less those sent already: a preempted prefill computes some again."""
        entries = result.prompt_logprobs.get(share.item.row)
        if not entries:
            return None
        request = share.request
        known = max(0, request.num_prompt_logprobs - share.start)
        request.num_prompt_logprobs = max(request.num_prompt_logprobs, share.start + len(entries))
        return entries[known:] or None

    def _end_with_error(self, request: Request, reason: FinishReason, message: str, code: ErrorCode) -> None:
        self._finish(request, reason)
        self._deltas.append(
            TokenDelta(
                request_id=request.request_id, finish_reason=reason, error=message, error_code=code.value
            )
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """The one way out: give back row and blocks, forget the request."""
        previous, request.status = request.status, RequestStatus.FINISHED
        if previous is RequestStatus.RUNNING:
            self._leave_row(request)
        else:
            self._waiting.note_left()
        self._kv.release(request)
        del self._requests[request.request_id]
        finished = self._stats.requests_finished
        finished[reason.value] = finished.get(reason.value, 0) + 1
