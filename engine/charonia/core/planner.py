"""Decides which requests a step advances, by how many tokens, and who must make room. Torch-free.

Single tokens come first, then prefills that have begun, then requests that wait; a request that finds no block takes
those of the last one in serving order.
"""

from collections.abc import Callable

from charonia.config import SchedulerConfig
from charonia.core.common_prefix import CommonPrefix
from charonia.core.kv_manager import KVManager
from charonia.core.queue import RunningList, WaitingQueue
from charonia.core.stats import EngineStats
from charonia.core.step import BlockDelta, NewRow
from charonia.core.step_builder import Launched, StepBuilder
from charonia.request import Request, RequestStatus

MAX_SKIPPED_LONG_PROMPTS = 64
"""Long prompts that short ones behind them may overtake in one step."""


class StepPlanner:
    """Owns the queue of waiting requests, the list of running ones, and the rows on the device."""

    def __init__(
        self, config: SchedulerConfig, kv: KVManager, stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._kv = kv
        self._stats = stats
        self._clock = clock
        self._waiting = WaitingQueue(config.policy)
        self._running = RunningList(config.policy)
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._common_prefix = CommonPrefix(kv, config.block_size)
        self._next_step_id = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in rows."""
        return len(self._running)

    def queue(self, request: Request) -> None:
        """Let a request wait for its turn."""
        request.status = RequestStatus.WAITING
        self._waiting.push(request)

    def take_out(self, request: Request, previous: RequestStatus) -> None:
        """A request has just ended; previous: its status until then."""
        if previous is RequestStatus.RUNNING:
            self._leave_row(request)
        elif previous is RequestStatus.WAITING:
            self._waiting.note_left()

    def plan(self, *, constrained: bool) -> Launched | None:
        """The next step; None when no request can advance. constrained: whether any request may have a matcher."""
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
        launched = step.finish(freed, num_common, constrained)
        self._stats.note_step(budget - step.budget, len(launched.decodes) + len(launched.chunked))
        return launched

    # ---- running requests ----

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
        request.num_preemptions += 1
        self._stats.preemptions += 1
        self.queue(request)

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
