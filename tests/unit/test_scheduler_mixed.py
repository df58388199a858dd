"""Requests of every kind beside each other, come and gone in any order: each ends once, as if it had been alone.

With lookahead and without it all bring the same, as both bring what the oracle says.
"""

from dataclasses import dataclass

import msgspec
import pytest
from charonia.config import SchedulerConfig
from charonia.core.engine_core import EngineCore
from charonia.core.scheduler import Scheduler
from charonia.pooling_params import PoolingParams
from charonia.request import EngineRequest, TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.structured_params import StructuredOutputsParams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mixed_device import EOS, MixedDevice, WordGrammars, embedding, outcome_of

WORDS = ("", "a", "aaaa", "aaxa", "!", "aaaaaaaaaa")
POOLINGS = ("last", "mean", "cls")


@dataclass(frozen=True)
class Action:
    """kind: "add", "step", "compile", "abort" or "tick". number: what it is made of."""

    kind: str
    number: int


class Harness:
    """One engine, and what it has told of its requests."""

    def __init__(self, cfg: SchedulerConfig) -> None:
        self.config = cfg
        self.now = 0.0
        self.grammars = WordGrammars()
        scheduler = Scheduler(cfg, clock=lambda: self.now, grammars=self.grammars)
        self.core = EngineCore(scheduler, MixedDevice(cfg), lookahead=cfg.lookahead)
        self.requests: dict[int, EngineRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.scored: dict[int, list[int]] = {}
        self.ends: dict[int, TokenDelta] = {}

    def act(self, action: Action) -> None:
        number = action.number
        if action.kind == "add":
            for data in random_requests(len(self.requests), number, self.config):
                self.core.add(data)
                self.requests[data.request_id] = data
                self.outputs[data.request_id], self.scored[data.request_id] = [], []
        elif action.kind == "compile":
            self.grammars.release()
        elif action.kind == "tick":
            self.now += number % 10
        elif action.kind == "abort" and self.requests:
            self.core.abort(number % len(self.requests))
        elif action.kind == "step":
            self.step()

    def step(self) -> None:
        for delta in self.core.step():
            assert delta.request_id not in self.ends, "nothing follows the end of a request"
            self.outputs[delta.request_id] += delta.token_ids
            self.scored[delta.request_id] += [entry.token_ids[0] for entry in delta.prompt_logprobs or []]
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta

    def drain(self) -> None:
        for _ in range(5000):
            if not self.core.has_work:
                break
            self.grammars.release()
            self.step()
        assert not self.core.has_work, "a request starved"
        stats = self.core.stats()
        assert stats.kv_blocks_used == 0, "blocks leaked"
        assert stats.num_running == stats.num_waiting == 0
        assert set(self.ends) == set(self.requests), "every request ends once"
        assert sum(stats.requests_finished.values()) == len(self.requests)

    def check(self) -> None:
        """Whoever has not been cancelled has had what is due."""
        for request_id, data in self.requests.items():
            end, output, due = self.ends[request_id], self.outputs[request_id], outcome_of(data)
            if end.finish_reason == "abort":
                assert output == due.tokens[: len(output)]
                continue
            assert (output, end.finish_reason, end.error_code) == (due.tokens, due.reason, due.blame)
            if data.pooling is not None:
                assert end.embedding == embedding(data.prompt_token_ids)
            if data.sampling.prompt_logprobs is not None and end.finish_reason != "error":
                assert self.scored[request_id] == data.prompt_token_ids[1:]


def random_requests(first_id: int, number: int, cfg: SchedulerConfig) -> list[EngineRequest]:
    """One request, or the sequences of one with n > 1."""
    kind = number % 5
    pooling = PoolingParams(pooling_type=POOLINGS[number // 5 % 3]) if kind == 0 else None  # type: ignore[arg-type]
    longest = cfg.max_model_len - (0 if pooling else 1)
    length, family = 1 + number // 7 % longest, number // 11 % 3
    max_tokens = 1 if pooling else 1 + number // 13 % (cfg.max_model_len - length)
    form = StructuredOutputsParams(regex="w" + WORDS[number // 17 % len(WORDS)]) if kind in (1, 2) else None
    count = 1 + number // 19 % 3 if kind != 0 else 1
    sampling = SamplingParams(
        min_tokens=number // 23 % 4, max_tokens=None, structured_outputs=form,
        prompt_logprobs=0 if kind == 3 and number // 29 % 3 == 0 else None,
    )  # fmt: skip
    return [
        EngineRequest(
            request_id=first_id + i,
            prompt_token_ids=[(family * 11 + j * j) % 30 for j in range(length)],
            sampling=sampling,
            seed=number % 1000 + i,
            max_tokens=max_tokens,
            arrival_time=0.0,
            stop_token_ids=[EOS, 9] if number // 31 % 3 else [],
            bad_words=[[1, 2]] if number // 37 % 4 == 0 and pooling is None else [],
            priority=number // 41 % 3,
            deadline=40.0 if number // 43 % 9 == 0 else None,
            cache_salt=str(number // 47 % 2),
            pooling=pooling,
        )
        for i in range(count)
    ]


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    block_size, max_len = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(6, 40))
    fits_one = -(-max_len // block_size)
    rows = draw(st.integers(1, 6))
    return SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=draw(st.integers(rows, 24)),
        max_model_len=max_len,
        block_size=block_size,
        num_blocks=1 + fits_one + draw(st.integers(0, 2 * fits_one)),
        long_prefill_token_threshold=draw(st.integers(1, 16)),
        max_long_partial_prefills=draw(st.integers(1, 3)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_prefix_caching=draw(st.booleans()),
    )


KINDS = ["add", "add", "step", "step", "step", "step", "compile", "abort", "tick"]
ACTIONS = st.lists(st.builds(Action, st.sampled_from(KINDS), st.integers(0, 10**9)), max_size=70)


@pytest.mark.parametrize("lookahead", [0, 1])
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cfg=configs(), actions=ACTIONS)
def test_every_request_brings_what_it_would_alone(
    lookahead: int, cfg: SchedulerConfig, actions: list[Action]
) -> None:
    harness = Harness(msgspec.structs.replace(cfg, lookahead=lookahead))
    for action in actions:
        harness.act(action)
    harness.drain()
    harness.check()
