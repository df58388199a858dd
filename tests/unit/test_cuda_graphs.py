"""Which graph runs a step: every step fits its graph, and the graphs are few and known beforehand."""

from collections.abc import Callable

import numpy as np
import pytest
from charonia.worker.batch import StepLayout
from charonia.worker.cuda_graphs import (
    FREE_PADDING,
    MAX_PADDING,
    GraphKey,
    GraphSizes,
    decode_sizes,
    dry_run_keys,
    mixed_sizes,
)
from charonia.worker.sampling_mode import SamplingMode

LIMITS = [(1, 1), (1, 512), (3, 64), (8, 100), (64, 64), (130, 2048), (256, 8192), (1000, 3000), (1024, 8192)]
"""max_num_seqs, max_num_tokens."""


def decodes(entries: int) -> StepLayout:
    ones = np.ones(entries, np.int32)
    return StepLayout(ones, ones, ones, ones, entries, entries)


def mixed(entries: int, tokens: int) -> StepLayout:
    """One chunk behind single tokens; `tokens` may equal `entries`: the last does not sample then."""
    lengths = np.ones(entries, np.int32)
    lengths[-1] = tokens - (entries - 1)
    return StepLayout(lengths, lengths, lengths, lengths, entries - 1, tokens)


@pytest.mark.parametrize("sizes", [decode_sizes, mixed_sizes])
@pytest.mark.parametrize("most", [1, 2, 3, 63, 64, 65, 200, 256, 257, 1000, 1024])
def test_sizes_ascend_to_the_limit(sizes: Callable[[int], list[int]], most: int) -> None:
    found = sizes(most)
    assert found == sorted(set(found))
    assert found[-1] == most
    assert found[0] >= 1


@pytest.mark.parametrize(("seqs", "tokens"), LIMITS)
@pytest.mark.parametrize("mode", [SamplingMode.PLAIN, SamplingMode.FILTERED])
def test_every_decode_step_is_a_graph_as_a_whole(seqs: int, tokens: int, mode: SamplingMode) -> None:
    sizes = GraphSizes(max_num_seqs=seqs, max_num_tokens=tokens, shares_prefix=True)
    known = set(sizes.keys())
    for entries in range(1, seqs + 1):
        key = sizes.key_for(decodes(entries), mode, False)
        assert key is not None and key in known
        assert key.decodes_only and key.mode is mode
        sharing = sizes.key_for(decodes(entries), mode, True)
        assert sharing is not None and sharing in known
        assert sharing.shares_prefix and entries <= sharing.num_entries <= seqs
        assert entries <= key.num_entries == key.num_tokens <= seqs
        # Sizes are 8 apart up to 64, 16 up to 256, 128 at most beyond.
        step = 8 if entries <= 64 else 16 if entries <= 256 else 128
        assert key.num_entries < entries + step


@pytest.mark.parametrize(("seqs", "budget"), LIMITS)
def test_every_step_with_chunks_has_a_graph_or_would_be_padded_too_much(seqs: int, budget: int) -> None:
    sizes = GraphSizes(max_num_seqs=seqs, max_num_tokens=budget, shares_prefix=False)
    known = set(sizes.keys())
    for tokens in {*range(1, budget + 1, 7), *range(FREE_PADDING - 2, FREE_PADDING + 3), budget}:
        if tokens > budget:
            continue
        for entries in {1, 2, 127, 128, 129, 512, 513, seqs}:
            if entries > min(seqs, tokens):
                continue
            key = sizes.key_for(mixed(entries, tokens), SamplingMode.FILTERED, False)
            if key is None:
                assert tokens > FREE_PADDING
                continue
            assert key in known
            assert not key.decodes_only and not key.shares_prefix
            assert key.num_entries in decode_sizes(seqs), "drawn in a size that is compiled"
            assert entries <= key.num_entries <= key.num_tokens
            assert tokens <= key.num_tokens <= budget
            assert key.num_entries <= seqs
            assert tokens <= FREE_PADDING or key.num_tokens <= tokens * (1 + MAX_PADDING)


def test_full_steps_are_not_padded() -> None:
    sizes = GraphSizes(max_num_seqs=256, max_num_tokens=8192, shares_prefix=False)
    key = sizes.key_for(mixed(200, 8192), SamplingMode.PLAIN, False)
    assert key == GraphKey(256, 8192)


def test_large_steps_between_the_sizes_have_no_graph() -> None:
    sizes = GraphSizes(max_num_seqs=256, max_num_tokens=8192, shares_prefix=False)
    assert sizes.key_for(mixed(200, 5000), SamplingMode.PLAIN, False) is None
    assert sizes.key_for(mixed(2, 7500), SamplingMode.PLAIN, False) is not None


def test_steps_that_the_host_has_a_part_in_end_with_hidden_states() -> None:
    sizes = GraphSizes(max_num_seqs=64, max_num_tokens=512, shares_prefix=True)
    known = set(sizes.keys())
    for layout in (decodes(5), decodes(64), mixed(5, 70)):
        for shares in (False, True):
            key = sizes.key_for(layout, SamplingMode.FULL, shares)
            assert key in known and key.mode is None
    assert sizes.key_for(decodes(1), SamplingMode.FULL, False) == GraphKey(1, 1), (
        "not padded to a chunk's size"
    )
    keys = {sizes.key_for(mixed(5, 70), mode, False) for mode in SamplingMode}
    assert len(keys) == 1, "whatever is drawn"


@pytest.mark.parametrize(("seqs", "tokens"), LIMITS)
def test_logits_are_computed_in_the_size_that_they_would_be_without_the_host(seqs: int, tokens: int) -> None:
    sizes = GraphSizes(max_num_seqs=seqs, max_num_tokens=tokens, shares_prefix=True)
    for entries in range(1, seqs + 1):
        key = sizes.key_for(decodes(entries), SamplingMode.FULL, False)
        plain = sizes.key_for(decodes(entries), SamplingMode.PLAIN, False)
        if key is None or plain is None:
            continue
        drawn = sizes.entries_drawn(key, decodes(entries))
        assert entries <= drawn == plain.num_entries
        assert drawn <= key.num_entries, "of which the graph leaves hidden states"
        layout = mixed(entries, min(tokens, entries + 5))
        key = sizes.key_for(layout, SamplingMode.FULL, False)
        if key is not None and layout.num_tokens > entries:
            assert sizes.entries_drawn(key, layout) == key.num_entries


@pytest.mark.parametrize(("seqs", "budget"), LIMITS)
def test_keys_are_distinct_and_the_largest_comes_first(seqs: int, budget: int) -> None:
    keys = GraphSizes(max_num_seqs=seqs, max_num_tokens=budget, shares_prefix=True).keys()
    assert len(set(keys)) == len(keys)
    assert (keys[0].num_entries, keys[0].num_tokens) == (min(seqs, budget), budget)
    assert [key.num_tokens for key in keys] == sorted((key.num_tokens for key in keys), reverse=True)
    # The runner measures the memory of the first key and of the largest step of decodes.
    assert next(key for key in keys if key.decodes_only).num_entries == seqs
    assert len(keys) <= 220


@pytest.mark.parametrize("shares_prefix", [False, True])
@pytest.mark.parametrize(("seqs", "budget"), LIMITS)
def test_dry_runs_stay_within_the_buffers(seqs: int, budget: int, shares_prefix: bool) -> None:
    keys = dry_run_keys(seqs, budget, shares_prefix)
    assert all(1 <= key.num_entries <= seqs and key.num_tokens <= budget for key in keys)
    assert all(key.num_entries <= key.num_tokens for key in keys)
    assert any(key.shares_prefix for key in keys) == shares_prefix
    assert all(key.decodes_only for key in keys if key.shares_prefix)
    assert {key.mode for key in keys} == {SamplingMode.PLAIN, SamplingMode.FILTERED, None}
    assert max(key.num_tokens for key in keys) == budget
    alone = [key.num_entries for key in keys if key.decodes_only and not key.shares_prefix]
    assert set(alone) >= {size for size in decode_sizes(seqs) if size <= 128} | {seqs}
