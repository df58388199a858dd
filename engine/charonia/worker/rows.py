"""State of the running requests on the device: one permanent row each, changed only by deltas."""

from dataclasses import dataclass

import torch

from charonia.core.step import NewRow, StepPlan
from charonia.sampling_params import SamplingParams
from charonia.worker.logit_rules import LogitRules


@dataclass(slots=True)
class RowState:
    """What the host knows of an occupied row.

    num_computed: position of the row's next token. num_prompt: prompt length. rules: of the constraints on
    its tokens. The rest is as in `NewRow`.
    """

    num_computed: int
    num_prompt: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: list[int]
    rules: LogitRules


class RequestRows:
    """Rows of all running requests.

    token_ids: [max_num_seqs, max_model_len] int32, prompt and sampled tokens; the sampler appends to it on the device,
    so the next step finds its input without a detour through the host.
    block_table: [max_num_seqs, max_blocks] int32; entries past a row's blocks are the null block.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self._vocab_size = vocab_size
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int32, device=device)
        self.block_table = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._states: list[RowState | None] = [None] * max_num_seqs
        self._num_blocks = [0] * max_num_seqs

    def __getitem__(self, row: int) -> RowState:
        state = self._states[row]
        assert state is not None, f"row {row} is empty"
        return state

    def apply(self, plan: StepPlan) -> None:
        """Bring the rows up to date with a plan; must run before the plan's step."""
        for row in plan.freed_rows:
            self._states[row] = None
            self.block_table[row, : self._num_blocks[row]] = 0
            self._num_blocks[row] = 0
        for new in plan.new_rows:
            self._enter(new)
        for delta in plan.block_deltas:
            self._append_blocks(delta.row, delta.block_ids)

    def _enter(self, new: NewRow) -> None:
        row = new.row
        tokens = torch.tensor(new.token_ids, dtype=torch.int32)
        self.token_ids[row, : len(tokens)] = tokens.to(self.token_ids.device, non_blocking=True)
        self._append_blocks(row, new.block_ids)
        self._states[row] = RowState(
            new.num_computed_tokens,
            new.num_prompt_tokens,
            new.sampling,
            new.seed,
            new.stop_token_ids,
            LogitRules.build(new, self._vocab_size, self.token_ids.device),
        )

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        start = self._num_blocks[row]
        end = start + len(block_ids)
        blocks = torch.tensor(block_ids, dtype=torch.int32)
        self.block_table[row, start:end] = blocks.to(self.block_table.device, non_blocking=True)
        self._num_blocks[row] = end
