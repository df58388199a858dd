"""How a plan becomes a batch: order, lengths, positions, padding, and what the device makes of it."""

import numpy as np
import pytest
import torch
from charonia.core.step import BlockDelta, NewRow, ScheduledRequest, StepPlan
from charonia.sampling_params import SamplingParams
from charonia.worker.batch import SampledRow, StepBuffers, StepLayout
from charonia.worker.model_runner import MIN_SHARED_KEYS, MIN_SHARING_ENTRIES, pays_to_share
from charonia.worker.rows import RequestRows

BLOCK_SIZE = 4


def token(row: int, position: int) -> int:
    return 100 * (row + 1) + position


def new_row(row: int, length: int, computed: int, blocks: list[int]) -> NewRow:
    tokens = [token(row, position) for position in range(length)]
    return NewRow(row, tokens, length, blocks, computed, SamplingParams(), 0, [], [])


@pytest.fixture
def rows() -> RequestRows:
    """Row 0: 6 tokens, 5 of them computed. Row 2: 10, none. Row 3: 9, the first block from a cache. Row 5: 2, one."""
    rows = RequestRows(
        max_num_seqs=6, max_model_len=16, block_size=BLOCK_SIZE, vocab_size=1000, device=torch.device("cpu")
    )
    entering = [
        new_row(0, 6, 5, [1, 2]), new_row(2, 10, 0, [3]), new_row(3, 9, 4, [4, 5, 6]), new_row(5, 2, 1, [7]),
    ]  # fmt: skip
    rows.apply(StepPlan(0, [], new_rows=entering, block_deltas=[BlockDelta(2, [8, 9])]))
    return rows


def mixed_plan(prefix_blocks: int = 0) -> StepPlan:
    chunks = [ScheduledRequest(2, 6, False), ScheduledRequest(3, 5, True)]
    return StepPlan(1, [5, 0], chunks, num_common_prefix_blocks=prefix_blocks)


def as_lists(*arrays: np.ndarray) -> list[list[int]]:
    assert all(array.dtype == np.int32 for array in arrays)
    return [array.tolist() for array in arrays]


def test_single_tokens_come_first_in_the_plans_order(rows: RequestRows) -> None:
    layout = StepLayout.of(mixed_plan(), rows)
    assert as_lists(layout.rows, layout.lengths, layout.starts, layout.samples) == [
        [5, 0, 2, 3], [1, 1, 6, 5], [1, 5, 0, 4], [1, 1, 0, 1],
    ]  # fmt: skip
    assert (layout.num_decodes, layout.num_entries, layout.num_tokens) == (2, 4, 13)
    assert not layout.decodes_only
    assert as_lists(layout.query_start_loc()) == [[0, 1, 2, 8, 13]]
    assert layout.sampled() == [SampledRow(5, 2), SampledRow(0, 6), SampledRow(3, 9)]


def test_positions_move_on(rows: RequestRows) -> None:
    first = StepLayout.of(mixed_plan(), rows)
    assert rows.positions.tolist() == [6, 0, 6, 9, 0, 2]
    assert first.starts.tolist() == [1, 5, 0, 4], "a layout keeps the positions that it was made at"
    second = StepLayout.of(StepPlan(2, [0, 3], [ScheduledRequest(2, 4, True)]), rows)
    assert second.starts.tolist() == [6, 9, 6]
    assert rows.positions.tolist() == [7, 0, 10, 10, 0, 2]


def test_a_step_of_decodes(rows: RequestRows) -> None:
    layout = StepLayout.of(StepPlan(1, [5, 0]), rows)
    assert layout.decodes_only
    assert (layout.num_tokens, layout.common_prefix) == (2, 0)
    assert layout.lengths.tolist() == layout.samples.tolist() == [1, 1]


def test_a_single_token_that_does_not_sample_is_no_decode(rows: RequestRows) -> None:
    layout = StepLayout.of(StepPlan(1, [], [ScheduledRequest(2, 1, False)]), rows)
    assert not layout.decodes_only
    assert layout.sampled() == []


def test_the_common_prefix_is_counted_in_keys(rows: RequestRows) -> None:
    assert StepLayout.of(mixed_plan(prefix_blocks=3), rows).common_prefix == 3 * BLOCK_SIZE


@pytest.mark.parametrize("padded", [4, 6])
def test_staging_pads_with_empty_entries(rows: RequestRows, padded: int) -> None:
    layout = StepLayout.of(mixed_plan(prefix_blocks=1), rows)
    layout.stage(rows, padded)
    rows.flush()
    empty = padded - 4
    assert rows.step_rows[:padded].tolist() == [5, 0, 2, 3] + [0] * empty
    assert rows.step_samples[:padded].tolist() == [1, 1, 0, 1] + [0] * empty
    assert rows.step_starts[: padded + 1].tolist() == [0, 1, 2, 8, 13] + [13] * empty
    assert rows.step_prefix.tolist() == [BLOCK_SIZE]


def test_what_is_staged_follows_every_change(rows: RequestRows) -> None:
    plans = [
        StepPlan(1, [5, 0]), StepPlan(2, [5, 0]), StepPlan(3, [5]), StepPlan(4, [5, 0]), StepPlan(5, [0, 5]),
        StepPlan(6, [0, 5], [ScheduledRequest(2, 3, False)], num_common_prefix_blocks=1), StepPlan(7, [0, 5]),
    ]  # fmt: skip
    for plan in plans:
        layout = StepLayout.of(plan, rows)
        layout.stage(rows, layout.num_entries)
        rows.flush()
        count = layout.num_entries
        assert rows.step_rows[:count].tolist() == layout.rows.tolist()
        assert rows.step_samples[:count].tolist() == layout.samples.tolist()
        assert rows.step_starts[: count + 1].tolist() == layout.query_start_loc().tolist()
        assert rows.step_prefix.tolist() == [layout.common_prefix]


def test_the_device_finds_its_inputs(rows: RequestRows) -> None:
    buffers = StepBuffers(rows, max_num_tokens=16)
    layout = StepLayout.of(mixed_plan(), rows)
    layout.stage(rows, 6)
    rows.flush()
    batch = buffers.batch(6, 15)
    assert (batch.num_entries, batch.num_tokens) == (6, 15)
    buffers.prepare(batch)
    places = [(5, 1), (0, 5), *((2, p) for p in range(6)), *((3, p) for p in range(4, 9))]
    assert batch.input_ids.tolist() == [token(*place) for place in places] + [0, 0]
    assert batch.positions.tolist() == [position for _, position in places] + [0, 0]
    tables = {0: [1, 2], 2: [3, 8, 9], 3: [4, 5, 6], 5: [7]}
    slots = [tables[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for row, p in places]
    assert batch.slot_mapping.tolist() == [*slots, 0, 0]
    assert batch.seq_lens.tolist() == [2, 6, 6, 9, 0, 0]


def test_batches_share_their_memory(rows: RequestRows) -> None:
    buffers = StepBuffers(rows, max_num_tokens=16)
    small, large = buffers.batch(1, 2), buffers.batch(6, 16)
    for name in ("rows", "samples", "query_start_loc", "seq_lens", "input_ids", "positions", "slot_mapping"):
        assert getattr(small, name).data_ptr() == getattr(large, name).data_ptr()


def sharing_layout(entries: int, prefix: int, lengths: int = 1) -> StepLayout:
    ones = np.ones(entries, np.int32)
    decodes = entries if lengths == 1 else 0
    return StepLayout(np.arange(entries), ones * lengths, ones, ones, decodes, entries * lengths, prefix)


def test_a_long_prefix_of_many_decodes_is_read_once() -> None:
    assert pays_to_share(sharing_layout(MIN_SHARING_ENTRIES, MIN_SHARED_KEYS))
    assert not pays_to_share(sharing_layout(MIN_SHARING_ENTRIES - 1, MIN_SHARED_KEYS))
    assert not pays_to_share(sharing_layout(MIN_SHARING_ENTRIES, MIN_SHARED_KEYS - 1))
    assert not pays_to_share(sharing_layout(MIN_SHARING_ENTRIES, MIN_SHARED_KEYS, lengths=2))
    assert not pays_to_share(sharing_layout(100, 0))
