"""One step's input, laid out flat: the tokens of all scheduled rows, one after the other."""

from dataclasses import dataclass

import numpy as np
import torch

from charonia.core.step import StepPlan
from charonia.worker.rows import RequestRows


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each sequence's queries and keys are.

    slot_mapping: [T] int64, KV slot (block * block_size + offset) that each token's key and value go to.
    block_table: [B, max_blocks] int32. seq_lens: [B] int32, keys of each sequence, this step's included.
    query_start_loc: [B + 1] int32, where each sequence's tokens begin in the flat batch.
    """

    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row whose next token is drawn in this step; `position` is that of the new token."""

    row: int
    position: int


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One step's input.

    input_ids, positions: [T] int64. sample_indices: [S] int64, the flat index of each sampling row's last token.
    sampled: the S rows that sample, in the plan's order. chunks: (row, first position, flat start, length) of each
    scheduled row, for prompt logprobs.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    sample_indices: torch.Tensor
    sampled: list[SampledRow]
    chunks: list[tuple[int, int, int, int]]


def build_batch(plan: StepPlan, rows: RequestRows) -> InputBatch:
    """Lay out a step and move the rows' positions on."""
    device = rows.token_ids.device
    count = len(plan.scheduled)
    row_ids = np.fromiter((item.row for item in plan.scheduled), np.int64, count)
    lengths = np.fromiter((item.num_tokens for item in plan.scheduled), np.int64, count)
    starts = np.fromiter((rows[item.row].num_computed for item in plan.scheduled), np.int64, count)
    query_start_loc = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=query_start_loc[1:])
    owner = np.repeat(np.arange(count), lengths)
    positions = np.arange(len(owner)) - query_start_loc[owner] + starts[owner]

    sampled, indices, chunks = [], [], []
    for i, item in enumerate(plan.scheduled):
        state = rows[item.row]
        first = state.num_computed
        state.num_computed = end = first + item.num_tokens
        chunks.append((item.row, first, int(query_start_loc[i]), item.num_tokens))
        if item.samples:
            sampled.append(SampledRow(item.row, end))
            indices.append(int(query_start_loc[i + 1]) - 1)

    positions_d = torch.from_numpy(positions).to(device)
    token_rows = torch.from_numpy(row_ids[owner]).to(device)
    blocks = rows.block_table[token_rows, positions_d // rows.block_size].long()
    return InputBatch(
        input_ids=rows.token_ids[token_rows, positions_d].long(),
        positions=positions_d,
        attention=AttentionMetadata(
            slot_mapping=blocks * rows.block_size + positions_d % rows.block_size,
            block_table=rows.block_table[torch.from_numpy(row_ids).to(device)],
            seq_lens=torch.from_numpy((starts + lengths).astype(np.int32)).to(device),
            query_start_loc=torch.from_numpy(query_start_loc).to(device),
        ),
        sample_indices=torch.tensor(indices, dtype=torch.int64, device=device),
        sampled=sampled,
        chunks=chunks,
    )
