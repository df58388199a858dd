"""Counting by bucket: where values go, what has been added since, and samples that stand for many."""

import pytest
from charonia.core.histogram import Histogram
from charonia.core.stats import EngineStats
from charonia.serving import wire
from hypothesis import given
from hypothesis import strategies as st

BOUNDS = (1.0, 2.0, 5.0)


def filled(*values: float) -> Histogram:
    histogram = Histogram.empty(BOUNDS)
    for value in values:
        histogram.observe(value)
    return histogram


def test_a_bucket_holds_its_upper_end() -> None:
    histogram = filled(0.0, 1.0, 1.5, 2.0, 5.0, 5.1, 100.0)
    assert histogram.counts == [2, 2, 1, 2]
    assert histogram.sums == [1.0, 3.5, 5.0, 105.1]
    assert (histogram.count, histogram.sum) == (7, pytest.approx(114.6))


def test_what_has_been_added_since() -> None:
    histogram = filled(0.5)
    before = histogram.copy()
    histogram.observe(3.0, times=4)
    added = histogram.since(before)
    assert (added.counts, added.sums) == ([0, 0, 4, 0], [0.0, 0.0, 12.0, 0.0])
    assert before.counts == [1, 0, 0, 0]
    # An engine that was restarted counts from zero again.
    assert filled(1.5).since(histogram).counts == [0, 1, 0, 0]
    assert filled(1.5).since(None).counts == [0, 1, 0, 0]


@given(st.lists(st.floats(0.0, 10.0), max_size=60), st.integers(1, 80))
def test_samples(values: list[float], most: int) -> None:
    histogram = filled(*values)
    sample = histogram.sample(most)
    if len(values) <= most:
        assert filled(*sample).counts == histogram.counts
        assert sum(sample) == pytest.approx(sum(values))
        return
    # One for every bucket that has any, and rounding.
    assert len(sample) <= most + 2 * len(histogram.counts)
    for seen, counted in zip(filled(*sample).counts, histogram.counts, strict=True):
        assert (seen > 0) == (counted > 0)
        assert abs(seen - counted * most / len(values)) <= 1


def test_it_crosses_the_wire() -> None:
    stats = EngineStats()
    stats.note_step(num_tokens=40, num_sequences=3)
    stats.step_seconds.observe(0.25)
    frame = wire.decode_to_frontend(wire.encode(wire.OutputFrame([], stats)))
    assert isinstance(frame, wire.OutputFrame) and frame.stats == stats
    assert frame.stats.step_tokens.sum == 40 and frame.stats.step_sequences.count == 1
