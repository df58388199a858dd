"""One step's batch: what the host decides (`StepLayout`), and where the device finds its inputs (`InputBatch`)."""

from dataclasses import dataclass

import numpy as np
import torch
from charonia_kernels import prepare_step

from charonia.core.step import StepPlan
from charonia.worker.arena import IntArray
from charonia.worker.rows import RequestRows


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row whose next token is drawn in this step; `position` is that of the new token."""

    row: int
    position: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step's entries in the order of the flat batch: single tokens that sample first, then the plan's chunks.

    rows, lengths, starts, samples: [B] int32: row, number of tokens, position of the first of them, and whether the
    entry's next token is drawn. num_decodes: leading entries of one token that sample. common_prefix: leading keys that
    all entries share and that were computed before this step; a multiple of the block size.
    """

    rows: IntArray
    lengths: IntArray
    starts: IntArray
    samples: IntArray
    num_decodes: int
    num_tokens: int
    common_prefix: int = 0

    @classmethod
    def of(cls, plan: StepPlan, rows: RequestRows) -> "StepLayout":
        """Lay out a plan, and move the rows' positions on."""
        decode_rows, chunks = plan.decode_rows, plan.chunks
        num_decodes = len(decode_rows)
        row_ids = np.array(decode_rows + [chunk.row for chunk in chunks], np.int32)
        lengths, samples = np.ones_like(row_ids), np.ones_like(row_ids)
        if chunks:
            lengths[num_decodes:] = [chunk.num_tokens for chunk in chunks]
            samples[num_decodes:] = [chunk.samples for chunk in chunks]
        starts = rows.positions[row_ids]
        rows.positions[row_ids] += lengths
        prefix = plan.num_common_prefix_blocks * rows.block_size
        return cls(row_ids, lengths, starts, samples, num_decodes, int(lengths.sum()), prefix)

    @property
    def num_entries(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def decodes_only(self) -> bool:
        """Whether every entry is a single token that samples."""
        return self.num_decodes == self.num_entries

    def query_start_loc(self) -> IntArray:
        """[B + 1] int32: where each entry's tokens begin in the flat batch; the last is their number."""
        starts = np.zeros(self.num_entries + 1, np.int32)
        np.cumsum(self.lengths, out=starts[1:])
        return starts

    def sampled(self) -> list[SampledRow]:
        """The entries that sample, in order."""
        ends = self.starts + self.lengths
        return [
            SampledRow(int(row), int(end))
            for row, end, samples in zip(self.rows, ends, self.samples, strict=True)
            if samples
        ]

    def stage(self, rows: RequestRows, padded_entries: int) -> None:
        """Write the step's batch to the rows' arena, with empty entries behind up to `padded_entries`."""
        starts = _extended(self.query_start_loc(), padded_entries + 1, self.num_tokens)
        rows.stage_step(
            _extended(self.rows, padded_entries, 0),
            starts,
            _extended(self.samples, padded_entries, 0),
            self.common_prefix,
        )


def _extended(values: IntArray, size: int, fill: int) -> IntArray:
    """The values, and `fill` behind them; np.pad takes six times as long, which every step would pay."""
    if len(values) == size:
        return values
    longer = np.full(size, fill, np.int32)
    longer[: len(values)] = values
    return longer


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A step's inputs on the device, at addresses that never change. B entries and T tokens, padding included.

    rows, samples, seq_lens: [B]. query_start_loc: [B + 1]. input_ids, positions, slot_mapping: [T]. Padding entries
    have no tokens; padding tokens have id and position 0 and write to the null block. seq_lens counts the step's own
    keys.
    """

    rows: torch.Tensor
    samples: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor

    @property
    def num_entries(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)


class StepBuffers:
    """The memory behind every `InputBatch`."""

    def __init__(self, rows: RequestRows, max_num_tokens: int) -> None:
        # The CPU's kernels index with 64 bits; the GPU's never leave 32.
        dtype = torch.int64 if rows.device.type == "cpu" else torch.int32
        self._rows = rows
        self._seq_lens = torch.zeros_like(rows.step_rows)
        self._tokens = torch.zeros((3, max_num_tokens), dtype=dtype, device=rows.device)

    def batch(self, num_entries: int, num_tokens: int) -> InputBatch:
        """The batch of the first `num_entries` entries and `num_tokens` tokens."""
        input_ids, positions, slot_mapping = self._tokens[:, :num_tokens]
        return InputBatch(
            rows=self._rows.step_rows[:num_entries],
            samples=self._rows.step_samples[:num_entries],
            query_start_loc=self._rows.step_starts[: num_entries + 1],
            seq_lens=self._seq_lens[:num_entries],
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slot_mapping,
        )

    def prepare(self, batch: InputBatch) -> None:
        """Fill in what follows from the rows: ids, positions, slots, lengths. Device work alone."""
        rows = self._rows
        prepare_step(
            batch.rows, batch.query_start_loc, rows.num_computed, rows.token_ids, rows.block_table, rows.block_size,
            batch.input_ids, batch.positions, batch.slot_mapping, batch.seq_lens,
        )  # fmt: skip
