"""The scheduler, driven through random schedules with fabricated results by a device model that checks every plan."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from charonia.config import SchedulerConfig
from charonia.core.block_pool import NULL_BLOCK
from charonia.core.engine_core import EngineCore
from charonia.core.scheduler import Scheduler
from charonia.core.step import NewRow, StepPlan, StepResult
from charonia.errors import ErrorCode, InvalidRequestError, QueueFullError
from charonia.outputs import FinishReason, TokenLogprobs
from charonia.request import EngineRequest, TokenDelta
from charonia.sampling_params import SamplingParams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EOS = 7


def config(**overrides: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 48, "block_size": 4, "num_blocks": 33,
        "long_prefill_token_threshold": 12,
    }  # fmt: skip
    return SchedulerConfig(**{**values, **overrides})  # type: ignore[arg-type]


def next_token(tokens: list[int]) -> int:
    """A 'model': the next token is a function of the whole sequence, so that lost or crossed tokens show."""
    return hash(tuple(tokens)) % 40


@dataclass
class Row:
    tokens: list[int]
    blocks: list[int]
    computed: int
    num_prompt: int


@dataclass
class FakePending:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


@dataclass
class FakeDevice:
    """Executes plans as the runner would, and keeps the tokens that each KV slot was computed from."""

    config: SchedulerConfig
    rows: dict[int, Row] = field(default_factory=dict)
    slots: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    fail_steps: set[int] = field(default_factory=set)
    exclude_steps: set[int] = field(default_factory=set)
    plans: list[StepPlan] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> FakePending:
        self.plans.append(plan)
        for row in plan.freed_rows:
            del self.rows[row]
        for new in plan.new_rows:
            self._enter(new)
        for delta in plan.block_deltas:
            self.rows[delta.row].blocks.extend(delta.block_ids)
        scheduled = [item.row for item in plan.scheduled]
        assert plan.num_sampled == sum(item.samples for item in plan.scheduled)
        assert len(set(scheduled)) == len(scheduled)
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        assert [item.row for item in plan.scheduled[: len(plan.decode_rows)]] == plan.decode_rows
        assert not any(chunk.num_tokens == 1 and chunk.samples for chunk in plan.chunks)
        self._check_common_prefix(plan)
        self._write(plan)
        sampled, failed, excluded = [], [], []
        for item in plan.scheduled:
            row = self.rows[item.row]
            self._check_readable(row, row.computed + item.num_tokens)
            row.computed += item.num_tokens
            assert item.samples == (row.computed == len(row.tokens))
            if item.samples:
                token = next_token(row.tokens)
                row.tokens.append(token)
                sampled.append(token)
            if plan.step_id in self.fail_steps:
                failed.append(item.row)
            if plan.step_id in self.exclude_steps and item.samples:
                excluded.append(item.row)
        return FakePending(
            StepResult(plan.step_id, sampled, failed_rows=failed[:1], excluded_rows=excluded[:1])
        )

    def _enter(self, new: NewRow) -> None:
        assert new.row not in self.rows, "a row has one owner"
        assert 0 <= new.row < self.config.max_num_seqs
        self.rows[new.row] = Row(
            list(new.token_ids), list(new.block_ids), new.num_computed_tokens, new.num_prompt_tokens
        )

    def _check_common_prefix(self, plan: StepPlan) -> None:
        count = plan.num_common_prefix_blocks
        rows = [self.rows[item.row] for item in plan.scheduled]
        assert count == 0 or len(rows) > 1
        assert len({tuple(row.blocks[:count]) for row in rows}) == 1, "all rows begin with the same blocks"
        assert all(row.computed >= count * self.config.block_size for row in rows), "and have computed them"

    def _write(self, plan: StepPlan) -> None:
        """All writes of a layer come before its reads, as on the device."""
        size = self.config.block_size
        for item in plan.scheduled:
            row = self.rows[item.row]
            for position in range(row.computed, row.computed + item.num_tokens):
                block = row.blocks[position // size]
                assert block != NULL_BLOCK
                self.slots[block, position % size] = tuple(row.tokens[: position + 1])

    def _check_readable(self, row: Row, length: int) -> None:
        size = self.config.block_size
        for position in range(length):
            held = self.slots[row.blocks[position // size], position % size]
            assert held == tuple(row.tokens[: position + 1]), "a block was overwritten while in use"

    def shutdown(self) -> None:
        pass


def request(request_id: int, prompt: list[int], max_tokens: int = 5, **kwargs: object) -> EngineRequest:
    values: dict[str, object] = {
        "seed": 0,
        "arrival_time": 0.0,
        "sampling": SamplingParams(),
        "stop_token_ids": [EOS],
    }
    return EngineRequest(
        request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, **{**values, **kwargs}  # type: ignore[arg-type]
    )  # fmt: skip


class Harness:
    def __init__(self, cfg: SchedulerConfig) -> None:
        self.config = cfg
        self.now = 0.0
        self.scheduler = Scheduler(cfg, clock=lambda: self.now)
        self.device = FakeDevice(cfg)
        self.core = EngineCore(self.scheduler, self.device, lookahead=cfg.lookahead)
        self.requests: dict[int, EngineRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, TokenDelta] = {}

    def add(self, data: EngineRequest) -> None:
        self.core.add(data)
        self.requests[data.request_id] = data
        self.outputs[data.request_id] = []

    def step(self) -> None:
        self.collect(self.core.step())

    def collect(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert delta.request_id not in self.ends, "nothing follows the end of a request"
            self.outputs[delta.request_id].extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, "a request starved"
        self.check_empty()

    def check_empty(self) -> None:
        stats = self.core.stats()
        assert stats.kv_blocks_used == 0, "blocks leaked"
        assert stats.num_running == stats.num_waiting == 0
        assert set(self.ends) == set(self.requests), "every request ends once"

    def expected(self, data: EngineRequest) -> list[int]:
        tokens, out = list(data.prompt_token_ids), []
        while len(out) < data.max_tokens:
            out.append(next_token(tokens))
            tokens.append(out[-1])
            if out[-1] in data.stop_token_ids and len(out) >= data.sampling.min_tokens:
                break
        return out


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[SchedulerConfig, list[tuple[str, int]], int]:
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    max_len = draw(st.integers(8, 48))
    fits_one = -(-max_len // block_size)
    rows = draw(st.integers(1, 6))
    cfg = config(
        max_num_seqs=rows,
        max_num_batched_tokens=draw(st.integers(rows, 24)),
        max_model_len=max_len,
        block_size=block_size,
        num_blocks=1 + fits_one + draw(st.integers(0, 2 * fits_one)),
        long_prefill_token_threshold=draw(st.integers(1, 16)),
        max_long_partial_prefills=draw(st.integers(1, 3)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_prefix_caching=draw(st.booleans()),
        lookahead=draw(st.integers(0, 1)),
    )
    actions = draw(st.lists(st.tuples(st.sampled_from(["add", "add", "step", "step", "step", "abort", "tick"]),
                                      st.integers(0, 10**6)), max_size=60))  # fmt: skip
    return cfg, actions, draw(st.integers(0, 2**32))


def random_request(request_id: int, number: int, cfg: SchedulerConfig) -> EngineRequest:
    prompt_len = 1 + number % (cfg.max_model_len - 1)
    family = number // 7 % 3
    return request(
        request_id,
        [(family * 11 + i * i) % 40 for i in range(prompt_len)],
        1 + number // 13 % (cfg.max_model_len - prompt_len),
        priority=number // 17 % 3,
        cache_salt=str(number // 19 % 2),
        deadline=50.0 if number % 11 == 0 else None,
        sampling=SamplingParams(min_tokens=number // 23 % 4, max_tokens=None),
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios())
def test_random_schedules(scenario: tuple[SchedulerConfig, list[tuple[str, int]], int]) -> None:
    cfg, actions, _ = scenario
    harness = Harness(cfg)
    for action, number in actions:
        if action == "add":
            harness.add(random_request(len(harness.requests), number, cfg))
        elif action == "step":
            harness.step()
        elif action == "tick":
            harness.now += number % 10
        elif harness.requests:
            harness.core.abort(number % len(harness.requests))
    harness.now = min(harness.now, 49.0)
    harness.drain()
    for request_id, data in harness.requests.items():
        end, expected = harness.ends[request_id], harness.expected(data)
        if end.finish_reason is FinishReason.ABORT:
            assert harness.outputs[request_id] == expected[: len(harness.outputs[request_id])]
        else:
            assert harness.outputs[request_id] == expected
            last_stops = expected[-1] in data.stop_token_ids and len(expected) >= data.sampling.min_tokens
            assert end.finish_reason is (FinishReason.STOP if last_stops else FinishReason.LENGTH)


@settings(max_examples=60, deadline=None)
@given(scenarios(), st.sets(st.integers(0, 30), max_size=4))
def test_failed_rows_end_alone(
    scenario: tuple[SchedulerConfig, list[tuple[str, int]], int], fail_steps: set[int]
) -> None:
    cfg, actions, _ = scenario
    harness = Harness(cfg)
    harness.device.fail_steps = fail_steps
    for action, number in actions:
        if action == "add":
            harness.add(random_request(len(harness.requests), number, cfg))
        else:
            harness.step()
    harness.drain()
    for request_id, data in harness.requests.items():
        if harness.ends[request_id].finish_reason is not FinishReason.ERROR:
            assert harness.outputs[request_id] == harness.expected(data)


@pytest.mark.parametrize(
    ("fields", "code", "cached"),
    [
        ({"bad_words": [[3]]}, ErrorCode.INVALID_ARG, 12),
        ({"sampling": SamplingParams(allowed_token_ids=[3])}, ErrorCode.INVALID_ARG, 12),
        ({"sampling": SamplingParams(min_tokens=9, max_tokens=None)}, ErrorCode.INVALID_ARG, 12),
        # Nothing is excluded: the logits themselves are at fault.
        ({}, ErrorCode.INTERNAL, 0),
        ({"sampling": SamplingParams(min_tokens=9, max_tokens=None), "stop_token_ids": []}, ErrorCode.INTERNAL, 0),
    ],
)  # fmt: skip
def test_a_row_that_is_left_no_token(fields: dict[str, Any], code: ErrorCode, cached: int) -> None:
    harness = Harness(config())
    harness.device.exclude_steps = {2}
    prompt = list(range(10, 23))
    harness.add(request(0, prompt, max_tokens=20, **{"stop_token_ids": [EOS], **fields}))
    harness.drain()
    end = harness.ends[0]
    assert end.finish_reason is FinishReason.ERROR and end.error_code == code
    assert end.error is not None and ("'bad_words'" in end.error) is (code is ErrorCode.INVALID_ARG)
    assert len(harness.outputs[0]) == 2
    assert harness.core.stats().prefix_cache_hits == 0
    harness.add(request(1, prompt, max_tokens=2))
    harness.drain()
    assert harness.core.stats().prefix_cache_hits == cached


def test_lookahead_launches_before_reading() -> None:
    harness = Harness(config())
    harness.add(request(0, [1, 2, 3], max_tokens=4, stop_token_ids=[]))
    harness.step()
    assert len(harness.device.plans) == 1 and harness.outputs[0] == []
    harness.step()
    assert len(harness.device.plans) == 2 and len(harness.outputs[0]) == 1


def test_length_stop_wastes_no_token() -> None:
    harness = Harness(config())
    harness.add(request(0, [1, 2, 3], max_tokens=4, stop_token_ids=[]))
    harness.drain()
    assert sum(plan.num_tokens for plan in harness.device.plans) == 3 + 3


def test_prefix_is_computed_once() -> None:
    harness = Harness(config(max_num_batched_tokens=32, long_prefill_token_threshold=64))
    prompt = list(range(20))
    for i in range(3):
        harness.add(request(i, [*prompt, 30 + i], max_tokens=1))
    harness.drain()
    assert sum(plan.num_tokens for plan in harness.device.plans) == 21 + 1 + 1
    assert harness.core.stats().prefix_cache_hits == 40


def test_salt_and_prompt_logprobs_do_not_share() -> None:
    harness = Harness(config(max_num_batched_tokens=64, long_prefill_token_threshold=64))
    prompt = list(range(16))
    harness.add(request(0, prompt, max_tokens=1))
    harness.add(request(1, prompt, max_tokens=1, cache_salt="tenant"))
    harness.add(request(2, prompt, max_tokens=1, sampling=SamplingParams(prompt_logprobs=0)))
    harness.drain()
    assert sum(plan.num_tokens for plan in harness.device.plans) == 48


def test_decodes_advance_beside_a_long_prefill() -> None:
    harness = Harness(config(max_num_batched_tokens=8))
    harness.add(request(0, [1], max_tokens=12, stop_token_ids=[]))
    harness.step()
    harness.add(request(1, list(range(40)), max_tokens=2, stop_token_ids=[]))
    for _ in range(4):
        harness.step()
        assert harness.device.plans[-1].scheduled[0].num_tokens == 1
        assert harness.device.plans[-1].num_tokens == 8


def test_short_prompts_overtake_the_second_long_prefill() -> None:
    harness = Harness(config(max_num_batched_tokens=16, max_long_partial_prefills=1))
    harness.add(request(0, list(range(40)), max_tokens=2))
    harness.add(request(1, list(range(1, 41)), max_tokens=2))
    harness.add(request(2, [5, 6], max_tokens=2))
    harness.step()
    assert harness.core.stats().num_running == 1  # the first chunk takes the whole budget
    harness.step()
    harness.step()
    assert 2 in harness.ends or harness.outputs[2] or harness.core.stats().num_running == 2
    harness.drain()


def test_long_prompts_fill_the_budget_when_nothing_else_waits() -> None:
    """20 prompts of 13 tokens, each of them long, with 16 tokens a step and one long prefill at a time."""
    harness = Harness(config(num_blocks=200, max_num_seqs=20, max_num_batched_tokens=20))
    for i in range(20):
        harness.add(request(i, [i, *range(1, 13)], max_tokens=1))
    harness.drain()
    plans = harness.device.plans
    assert [plan.num_tokens for plan in plans] == [20] * 13


def test_short_prompts_come_before_further_long_ones() -> None:
    harness = Harness(config(max_num_batched_tokens=20, num_blocks=100))
    for i in range(3):
        harness.add(request(i, [i] * 13, max_tokens=2))
    harness.add(request(3, [9, 8, 7, 6], max_tokens=2))
    harness.step()
    # The first long prompt, then the short one, then what fits of the second long one.
    assert [len(new.token_ids) for new in harness.device.plans[0].new_rows] == [13, 4, 13]
    assert [chunk.num_tokens for chunk in harness.device.plans[0].chunks] == [13, 4, 3]
    harness.drain()


def test_prompts_at_the_threshold_are_not_long() -> None:
    harness = Harness(config(max_num_batched_tokens=36, num_blocks=100, max_num_seqs=8))
    for i in range(6):
        harness.add(request(i, [i] * 12, max_tokens=1))
    harness.drain()
    assert [plan.num_tokens for plan in harness.device.plans] == [36, 36]


def common_prefixes(harness: Harness) -> list[int]:
    return [plan.num_common_prefix_blocks for plan in harness.device.plans]


def test_rows_that_share_a_prefix() -> None:
    harness = Harness(config(max_num_batched_tokens=64, long_prefill_token_threshold=64))
    prompt = list(range(10, 21))  # two full blocks, and three tokens
    for i in range(3):
        harness.add(request(i, [*prompt, 30 + i], max_tokens=4, stop_token_ids=[]))
    harness.drain()
    # The first step computes the prefix; later ones only read it.
    assert common_prefixes(harness) == [0, 2, 2, 2]


def test_a_stranger_has_no_common_prefix() -> None:
    harness = Harness(config(max_num_batched_tokens=64, long_prefill_token_threshold=64))
    for i in range(2):
        harness.add(request(i, [1, 2, 3, 4, 5, 6 + i], max_tokens=9, stop_token_ids=[]))
    harness.add(request(2, [8, 9], max_tokens=5, stop_token_ids=[]))
    harness.add(request(3, [1, 2, 3, 4, 9], max_tokens=3, stop_token_ids=[]))
    harness.drain()
    found = common_prefixes(harness)
    assert set(found[:5]) == {0} and set(found[5:9]) == {1}


def test_a_row_alone_has_no_common_prefix() -> None:
    harness = Harness(config(max_num_batched_tokens=64))
    harness.add(request(0, list(range(10)), max_tokens=4, stop_token_ids=[]))
    harness.drain()
    assert set(common_prefixes(harness)) == {0}


def test_decoding_rows_are_plain_numbers() -> None:
    harness = Harness(config(max_num_batched_tokens=64))
    for i in range(3):
        harness.add(request(i, [i, 5, 6], max_tokens=6, stop_token_ids=[]))
    for _ in range(3):
        harness.step()
    first, *others = harness.device.plans
    assert first.decode_rows == [] and [chunk.num_tokens for chunk in first.chunks] == [3, 3, 3]
    for plan in others:
        assert plan.decode_rows == [chunk.row for chunk in first.chunks] and plan.chunks == []
        assert plan.num_tokens == plan.num_sampled == 3
    harness.drain()


def test_logprobs_of_one_row_leave_the_others_alone() -> None:
    scheduler = Scheduler(config(lookahead=0))
    for i in range(3):
        scheduler.add(request(i, [i, 1, 2], max_tokens=3, stop_token_ids=[]))
    seen: dict[int, list[tuple[int, float | None]]] = {0: [], 1: [], 2: []}
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        rows = [item.row for item in plan.scheduled if item.samples]
        tokens = [10 + row for row in rows]
        entry = TokenLogprobs([10 + rows[1]], [-0.5], 1)
        scheduler.update(StepResult(plan.step_id, tokens, logprobs={rows[1]: entry}))
        for delta in scheduler.take_deltas():
            logprob = delta.logprobs[0].logprobs[0] if delta.logprobs else None
            seen[delta.request_id].append((delta.token_ids[0], logprob))
    assert [len(found) for found in seen.values()] == [3, 3, 3]
    assert [set(found) for found in seen.values()] == [{(10, None)}, {(11, -0.5)}, {(12, None)}]


def test_step_times_add_up() -> None:
    harness = Harness(config())
    harness.add(request(0, [1, 2, 3], max_tokens=4, stop_token_ids=[]))
    harness.step()
    harness.step()
    before = replace(harness.core.times)
    harness.drain()
    times = harness.core.times.since(before)
    assert times.steps == len(harness.device.plans) - 1
    assert min(times.schedule, times.launch, times.wait, times.update) > 0.0
    assert times.device == 0.0 and times.device_steps == 0


def test_priority_preempts_for_a_row() -> None:
    harness = Harness(config(max_num_seqs=1, policy="priority"))
    harness.add(request(0, [1, 2], max_tokens=20, stop_token_ids=[], priority=5))
    for _ in range(3):
        harness.step()
    harness.add(request(1, [3, 4], max_tokens=2, stop_token_ids=[], priority=0))
    harness.drain()
    assert harness.core.stats().preemptions == 1
    assert list(harness.ends) == [1, 0]
    assert harness.outputs[0] == harness.expected(harness.requests[0])


def test_queue_is_bounded() -> None:
    harness = Harness(config(max_waiting_requests=2))
    for i in range(2):
        harness.add(request(i, [1]))
    with pytest.raises(QueueFullError, match="2 requests"):
        harness.core.add(request(9, [1]))
    assert harness.core.stats().requests_refused == 1
    harness.drain()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "match"),
    [([], 5, "at least one"), ([1], 0, "at least one"), ([1] * 40, 9, "exceed")],
)
def test_impossible_requests_are_refused(prompt: list[int], max_tokens: int, match: str) -> None:
    harness = Harness(config())
    with pytest.raises(InvalidRequestError, match=match):
        harness.core.add(request(0, prompt, max_tokens))
    harness.add(request(1, [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        harness.core.add(request(1, [1]))


def test_deadlines_of_requests_that_have_ended_are_forgotten() -> None:
    harness = Harness(config())
    harness.add(request(0, [1], deadline=1.0))
    for i in range(1, 400):
        harness.add(request(i, [1], deadline=1e9))
        harness.core.abort(i)
    assert len(harness.scheduler._deadlines) < 100 and harness.scheduler.next_deadline == 1.0


def test_deadlines_end_waiting_and_running_requests() -> None:
    harness = Harness(config(max_num_seqs=1))
    for i in range(2):
        harness.add(request(i, [1, 2], max_tokens=40, stop_token_ids=[], deadline=5.0))
    harness.step()
    harness.now = 6.0
    harness.drain()
    assert all(
        end.finish_reason is FinishReason.ABORT and end.error == "deadline exceeded"
        for end in harness.ends.values()
    )


def test_blocks_wait_for_the_step_in_flight() -> None:
    harness = Harness(config())
    harness.add(request(0, [1] * 8, max_tokens=8, stop_token_ids=[]))
    harness.step()
    harness.step()  # step 1 is in flight
    harness.core.abort(0)
    assert harness.core.stats().kv_blocks_used > 0
    harness.drain()


def test_prompt_logprobs_are_not_repeated_after_preemption() -> None:
    scheduler = Scheduler(config(max_num_seqs=1, policy="priority", lookahead=0, long_prefill_token_threshold=64,
                                 max_num_batched_tokens=4))  # fmt: skip
    data = request(0, list(range(10)), max_tokens=1, priority=3, sampling=SamplingParams(prompt_logprobs=0))
    scheduler.add(data)
    seen: list[int] = []

    def run_step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        item = plan.scheduled[0]
        for new in plan.new_rows:
            starts[new.row] = (new.num_computed_tokens, new.num_prompt_tokens)
        start, prompt_len = starts[item.row]
        end = start + item.num_tokens
        starts[item.row] = (end, prompt_len)
        entries = [TokenLogprobs([p + 1], [0.0], 1) for p in range(start, min(end, prompt_len - 1))]
        wants = prompt_len == 10
        scheduler.update(
            StepResult(plan.step_id, [1] * item.samples, prompt_logprobs={item.row: entries} if wants else {})
        )
        for delta in scheduler.take_deltas():
            seen.extend(entry.token_ids[0] for entry in delta.prompt_logprobs or [])

    starts: dict[int, tuple[int, int]] = {}
    run_step()
    scheduler.add(request(1, [1, 2], max_tokens=1, priority=0))
    while scheduler.has_work:
        run_step()
    assert seen == list(range(1, 10))
