"""Constrained requests in the scheduler and the step loop, with a grammar, a compiler and a device made up for it."""

import random
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from charonia.config import SchedulerConfig
from charonia.core.engine_core import EngineCore
from charonia.core.scheduler import Scheduler
from charonia.core.step import StepPlan, StepResult, TokenMasks
from charonia.errors import InvalidRequestError, QueueFullError, UnsupportedError
from charonia.outputs import FinishReason
from charonia.request import EngineRequest, Matcher, TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.structured_params import StructuredOutputsParams
from support.device_steps import Pending, Undrawn

EOS = 7
VOCAB = 32
LENGTH = 6


def nth(history: Sequence[int]) -> int:
    """The made-up grammar allows one token, which depends on all tokens before it."""
    return 8 + hash(tuple(history)) % 20


class FakeMatcher:
    """Allows `nth` of what it has accepted, and is complete after LENGTH tokens."""

    end_token_ids = frozenset({EOS})

    def __init__(self, *, fails_after: int | None = None, may_end: bool = False) -> None:
        self.history: list[int] = []
        self.complete = False
        self.error: str | None = None
        self.fails_after = fails_after
        self.may_end = may_end

    def accept(self, token_id: int) -> None:
        assert not self.complete, "nothing follows the end"
        assert token_id in self.allowed(), "only what was allowed may come"
        self.history.append(token_id)
        self.complete = len(self.history) == LENGTH or token_id == EOS

    def allowed(self) -> set[int]:
        return {nth(self.history)} | ({EOS} if self.may_end else set())

    def rollback(self, num_tokens: int) -> None:
        del self.history[len(self.history) - num_tokens :]


@dataclass
class FakeBackend:
    """Compiles when it is told to."""

    at_once: bool = True
    made: list[FakeMatcher] = field(default_factory=list)
    waiting: list[Future[Matcher]] = field(default_factory=list)
    matcher: dict[str, Any] = field(default_factory=dict)

    def compile(self, params: StructuredOutputsParams) -> Future[Matcher]:
        future: Future[Matcher] = Future()
        self.waiting.append(future)
        if self.at_once:
            self.release()
        return future

    def release(self) -> None:
        for future in self.waiting:
            if not future.set_running_or_notify_cancel():
                continue
            self.made.append(FakeMatcher(**self.matcher))
            future.set_result(self.made[-1])
        self.waiting.clear()

    def fill_masks(
        self, matchers: Sequence[Matcher], suppressed: Sequence[Collection[int]]
    ) -> tuple[memoryview, int]:
        words = bytearray()
        for matcher, without in zip(matchers, suppressed, strict=True):
            assert isinstance(matcher, FakeMatcher)
            if len(matcher.history) == matcher.fails_after:
                matcher.error = "too complex"
            allowed = matcher.allowed() - set(without) or matcher.allowed()
            words += sum(1 << token for token in allowed).to_bytes(4, "little")
        return memoryview(bytes(words)), 1

    def shutdown(self) -> None:
        self.waiting.clear()


@dataclass
class Row:
    tokens: list[int]
    computed: int
    constrained: bool


@dataclass
class FakeDevice:
    """Draws the largest allowed token, and 3 where all are allowed."""

    rows: dict[int, Row] = field(default_factory=dict)
    steps: list[Pending] = field(default_factory=list)
    undrawn: bool = False
    num_lookaheads: int = 0

    def launch(self, plan: StepPlan) -> Pending:
        assert not plan.constrained_rows
        self._apply(plan)
        return self.finish(plan, None)

    def launch_undrawn(self, plan: StepPlan) -> Undrawn:
        assert plan.constrained_rows
        self._apply(plan)
        self.undrawn = True
        self.num_lookaheads += not all(step.read for step in self.steps)
        return Undrawn(self, plan)

    def shutdown(self) -> None:
        pass

    def _apply(self, plan: StepPlan) -> None:
        assert not self.undrawn, "a step is drawn before the next is launched"
        for row in plan.freed_rows:
            del self.rows[row]
        for new in plan.new_rows:
            constrained = new.sampling.structured_outputs is not None
            assert not (constrained and new.stop_token_ids), "the masks see to the minimum length"
            self.rows[new.row] = Row(list(new.token_ids), new.num_computed_tokens, constrained)

    def finish(self, plan: StepPlan, masks: TokenMasks | None) -> Pending:
        self.undrawn = False
        words = {} if masks is None else {row: int.from_bytes(masks.words[4 * i : 4 * i + 4], "little")
                                          for i, row in enumerate(masks.rows)}  # fmt: skip
        assert set(words) <= set(plan.constrained_rows)
        sampled, constrained = [], []
        for item in plan.scheduled:
            row = self.rows[item.row]
            row.computed += item.num_tokens
            if item.samples:
                constrained += [item.row] if row.constrained else []
                # A row whose request has ended in the meantime has no mask, and its token goes nowhere.
                row.tokens.append(words[item.row].bit_length() - 1 if item.row in words else 3)
                sampled.append(row.tokens[-1])
        assert sorted(constrained) == sorted(plan.constrained_rows)
        self.steps = [step for step in self.steps if not step.read]
        self.steps.append(Pending(StepResult(plan.step_id, sampled)))
        return self.steps[-1]


class Harness:
    def __init__(self, backend: FakeBackend | None, **settings: Any) -> None:
        values = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 48, "block_size": 4,
                  "num_blocks": 33, "long_prefill_token_threshold": 12, "lookahead": 1, **settings}  # fmt: skip
        self.now = 0.0
        self.device = FakeDevice()
        scheduler = Scheduler(SchedulerConfig(**values), clock=lambda: self.now, grammars=backend)
        self.core = EngineCore(scheduler, self.device, lookahead=values["lookahead"])
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, TokenDelta] = {}

    def add(self, request_id: int, *, constrained: bool = True, prompt: int = 5, **fields: Any) -> None:
        sampling = fields.pop("sampling", {})
        if constrained:
            sampling["structured_outputs"] = StructuredOutputsParams(regex=f"a{request_id % 3}")
        request = EngineRequest(
            request_id=request_id, prompt_token_ids=list(range(prompt)), sampling=SamplingParams(**sampling),
            **{"seed": 0, "max_tokens": 20, "arrival_time": 0.0, "stop_token_ids": [EOS], **fields},
        )  # fmt: skip
        self.core.add(request)
        self.outputs[request_id] = []

    def step(self) -> None:
        for delta in self.core.step():
            assert delta.request_id not in self.ends, "nothing follows the end"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta

    def drain(self) -> None:
        for _ in range(2000):
            if not self.core.has_work:
                break
            self.step()
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert set(self.ends) == set(self.outputs)


def grammatical(length: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length:
        tokens.append(nth(tokens))
    return tokens


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_random_schedules(seed: int, lookahead: int) -> None:
    """Few blocks, so that requests are preempted; some are cancelled; half have no grammar."""
    rng = random.Random(seed)
    harness = Harness(FakeBackend(), lookahead=lookahead, num_blocks=13 + rng.randrange(8))
    limits = {}
    for i in range(16):
        limits[i] = rng.randrange(1, 10)
        harness.add(i, constrained=i % 2 == 0, prompt=rng.randrange(1, 20), max_tokens=limits[i])
        for _ in range(rng.randrange(4)):
            harness.step()
        if rng.random() < 0.2:
            harness.core.abort(rng.randrange(i + 1))
    harness.drain()
    for i, output in harness.outputs.items():
        reason = harness.ends[i].finish_reason
        if i % 2:
            assert output == [3] * len(output)
        else:
            assert output == grammatical(len(output))
        if reason is not FinishReason.ABORT:
            complete = i % 2 == 0 and limits[i] >= LENGTH
            assert len(output) == (LENGTH if complete else limits[i])
            assert reason is (FinishReason.STOP if complete else FinishReason.LENGTH)
            assert harness.ends[i].stop_token_id is None


def test_the_next_step_is_launched_before_the_last_is_read() -> None:
    harness = Harness(FakeBackend())
    harness.add(0)
    harness.drain()
    assert harness.outputs[0] == grammatical(LENGTH)
    assert harness.device.num_lookaheads >= LENGTH - 1


def test_requests_without_a_grammar_do_not_wait_for_one() -> None:
    backend = FakeBackend(at_once=False)
    harness = Harness(backend, max_waiting_requests=2)
    harness.add(0)
    harness.add(1, constrained=False, max_tokens=4)
    assert harness.core.stats().num_waiting == 2
    with pytest.raises(QueueFullError):
        harness.add(2)
    while 1 not in harness.ends:
        harness.step()
    assert harness.outputs[0] == [] and harness.core.stats().num_waiting == 1
    backend.release()
    harness.drain()
    assert harness.outputs[0] == grammatical(LENGTH)


def test_cancelled_and_expired_while_compiling() -> None:
    backend = FakeBackend(at_once=False)
    harness = Harness(backend)
    harness.add(0)
    harness.add(1, deadline=5.0)
    harness.step()
    harness.core.abort(0)
    harness.now = 6.0
    harness.step()
    assert harness.ends[0].error == "cancelled" and harness.ends[1].error == "deadline exceeded"
    assert all(future.cancelled() for future in backend.waiting), "the compiler need not go on"
    backend.release()
    harness.drain()
    assert not harness.device.rows


def test_a_grammar_at_fault_ends_its_request_alone() -> None:
    backend = FakeBackend(at_once=False)
    harness = Harness(backend)
    harness.add(0)
    harness.add(1)
    backend.waiting.pop(0).set_exception(InvalidRequestError("no such grammar"))
    backend.release()
    harness.drain()
    assert (harness.ends[0].error, harness.ends[0].error_code) == ("no such grammar", "INVALID_ARG")
    assert harness.outputs[1] == grammatical(LENGTH)


def test_a_grammar_that_cannot_be_followed_further() -> None:
    harness = Harness(FakeBackend(matcher={"fails_after": 3}))
    harness.add(0)
    harness.add(1, constrained=False, max_tokens=9)
    harness.drain()
    assert (harness.ends[0].error, harness.ends[0].error_code) == ("too complex", "INVALID_ARG")
    assert harness.outputs[0] == grammatical(3) and harness.outputs[1] == [3] * 9


@pytest.mark.parametrize(
    ("sampling", "stop_ids", "expected"),
    [
        ({}, [EOS], []),
        ({"ignore_eos": True}, [], grammatical(LENGTH)),
        ({"min_tokens": 3}, [EOS], grammatical(3)),
        ({"min_tokens": LENGTH + 5}, [EOS], grammatical(LENGTH)),
    ],
)
def test_what_keeps_a_sequence_going(
    sampling: dict[str, Any], stop_ids: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device takes the end wherever it may."""
    harness = Harness(FakeBackend(matcher={"may_end": True}))
    end_bit = 1 << EOS

    def draw_end(plan: StepPlan, masks: TokenMasks | None) -> Pending:
        if masks is not None and len(masks.rows):
            word = int.from_bytes(masks.words[:4], "little")
            masks = TokenMasks(
                masks.rows, memoryview((end_bit if word & end_bit else word).to_bytes(4, "little")), 1
            )
        return finish(plan, masks)

    finish = harness.device.finish
    monkeypatch.setattr(harness.device, "finish", draw_end)
    harness.add(0, sampling=sampling, stop_token_ids=stop_ids)
    harness.drain()
    ended_by_eos = len(expected) < LENGTH
    assert harness.outputs[0] == expected + [EOS] * ended_by_eos
    assert harness.ends[0].finish_reason is FinishReason.STOP
    assert harness.ends[0].stop_token_id == (EOS if ended_by_eos else None)


def test_without_a_backend() -> None:
    harness = Harness(None)
    with pytest.raises(UnsupportedError, match="tokenizer"):
        harness.add(0)
    assert not harness.core.has_work
