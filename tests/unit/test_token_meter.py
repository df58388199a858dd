"""What a frontend counts as tokens arrive: every gap once, whatever the mix of steps."""

from itertools import pairwise

import pytest
from charonia.outputs import FinishReason, RequestTimings
from charonia.request import TokenDelta
from charonia.serving.metrics import TokenMeter
from hypothesis import given
from hypothesis import strategies as st


def delta(request_id: int, num_tokens: int = 1, *, last: bool = False) -> TokenDelta:
    reason = FinishReason.LENGTH if last else None
    return TokenDelta(request_id=request_id, token_ids=[7] * num_tokens, finish_reason=reason)


def test_regular_steps() -> None:
    meter = TokenMeter()
    for i in range(5):
        meter.note_step([delta(1), delta(2)], 10.0 + 0.25 * i)
    counts = meter.take()
    assert counts.generation_tokens == 10
    assert counts.inter_token.count == 8
    assert counts.inter_token.sum == pytest.approx(2.0)
    assert meter.take().generation_tokens == 0


def test_gaps_and_tokens_that_come_together() -> None:
    meter = TokenMeter()
    meter.note_step([delta(1), delta(2, 3)], 1.0)
    meter.note_step([delta(2)], 2.0)
    meter.note_step([delta(1, 4)], 5.0)
    counts = meter.take()
    # Sequence 1 waited for 4 s for 4 tokens; of 2, two came with the first one.
    assert counts.inter_token.count == 2 + 1 + 4
    assert counts.inter_token.sum == pytest.approx(1.0 + 4.0)
    assert counts.generation_tokens == 9


def test_a_sequence_that_ended_is_forgotten() -> None:
    meter = TokenMeter()
    meter.note_step([delta(1), delta(2)], 1.0)
    meter.note_step([delta(1, last=True), TokenDelta(request_id=2, finish_reason=FinishReason.ABORT)], 2.0)
    # Engines that start over may give the ids anew.
    meter.note_step([delta(1), delta(2)], 9.0)
    assert meter.take().inter_token.count == 1
    meter.forget_sequences()
    meter.note_step([delta(1), delta(2)], 10.0)
    assert meter.take().inter_token.count == 0


@given(st.lists(st.tuples(st.floats(0.001, 3.0), st.sets(st.integers(0, 5))), max_size=30))
def test_every_gap_is_counted_once(steps: list[tuple[float, set[int]]]) -> None:
    meter, now = TokenMeter(), 100.0
    times: dict[int, list[float]] = {}
    for wait, ids in steps:
        now += wait
        meter.note_step([delta(i) for i in ids], now)
        for i in ids:
            times.setdefault(i, []).append(now)
    gaps = [after - before for seen in times.values() for before, after in pairwise(seen)]
    counts = meter.take()
    assert counts.generation_tokens == sum(map(len, times.values()))
    assert counts.inter_token.count == len(gaps)
    assert counts.inter_token.sum == pytest.approx(sum(gaps))


def test_prompts_without_output() -> None:
    meter = TokenMeter()
    meter.note_prompt(9)
    meter.note_step([TokenDelta(request_id=1, finish_reason=FinishReason.STOP)], 1.0)
    counts = meter.take()
    assert (counts.prompt_tokens, counts.generation_tokens, len(counts.first_tokens)) == (9, 0, 0)


def test_first_tokens() -> None:
    meter = TokenMeter()
    meter.note_first_token(RequestTimings(queue=0.5, first_token=2.0), 12)
    meter.note_first_token(RequestTimings(queue=0.1, first_token=0.3), 3)
    counts = meter.take()
    assert counts.prompt_tokens == 15
    seen = [(first.queue, first.prefill, first.total) for first in counts.first_tokens]
    assert seen == [(0.5, 1.5, 2.0), (0.1, pytest.approx(0.2), 0.3)]
