"""State of the running requests on the device: one permanent row each, changed only by deltas."""

from dataclasses import dataclass

import numpy as np
import torch
from charonia_kernels.sampling_params import NUM_PARAMS, pack

from charonia.core.step import NewRow, StepPlan
from charonia.sampling_params import SamplingParams
from charonia.worker.arena import Arena, IntArray, writer_for
from charonia.worker.logit_rules import NO_RULES, LogitRules
from charonia.worker.sampling_mode import SamplingMode, mode_of


@dataclass(slots=True)
class RowState:
    """What the host knows of an occupied row.

    num_prompt: prompt length. rules: the constraints on its tokens, on a CPU (a GPU's sampler has its own). mode: what
    it asks of the sampler. The rest is as in `NewRow`.
    """

    num_prompt: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: list[int]
    rules: LogitRules
    mode: SamplingMode


class RequestRows:
    """Rows of all running requests. Views of one arena; a plan's deltas are the only writes from the host.

    token_ids: [max_num_seqs, max_model_len] int32, prompt and sampled tokens; the end of a step appends to it on the
    device, so the next step finds its input without a detour through the host.
    block_table: [max_num_seqs, max_blocks] int32; entries past a row's blocks are stale and never followed.
    num_computed: [max_num_seqs] int32, position of the row's next token. params: [max_num_seqs, NUM_PARAMS] int32,
    as in `charonia_kernels.sampling_params`.
    step_rows, step_samples: [max_num_seqs] int32, step_starts: [max_num_seqs + 1] int32, step_prefix: [1] int32: the
    batch of the step at hand, see `InputBatch`.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        self._vocab_size = vocab_size
        self._arena = Arena(
            {
                "token_ids": (max_num_seqs, max_model_len),
                "block_table": (max_num_seqs, -(-max_model_len // block_size)),
                "num_computed": (max_num_seqs,),
                "params": (max_num_seqs, NUM_PARAMS),
                "step_rows": (max_num_seqs,),
                "step_samples": (max_num_seqs,),
                "step_starts": (max_num_seqs + 1,),
                "step_prefix": (1,),
            },
            device,
        )
        self._writer = writer_for(self._arena)
        tensors = self._arena.tensors
        self.token_ids, self.block_table = tensors["token_ids"], tensors["block_table"]
        self.num_computed, self.params = tensors["num_computed"], tensors["params"]
        self.step_rows, self.step_samples = tensors["step_rows"], tensors["step_samples"]
        self.step_starts, self.step_prefix = tensors["step_starts"], tensors["step_prefix"]
        self.positions: IntArray = np.zeros(max_num_seqs, np.int32)
        """The host's copy of `num_computed`, a launched step ahead of the device."""
        self._states: list[RowState | None] = [None] * max_num_seqs
        self._modes = [0] * len(SamplingMode)
        self._num_blocks = [0] * max_num_seqs
        self._staged: dict[str, IntArray] = {}

    def __getitem__(self, row: int) -> RowState:
        state = self._states[row]
        assert state is not None, f"row {row} is empty"
        return state

    @property
    def most_demanding_mode(self) -> SamplingMode:
        """What the rows in use ask of the sampler, at most."""
        return next((mode for mode in reversed(SamplingMode) if self._modes[mode]), SamplingMode.PLAIN)

    def find(self, row: int) -> RowState | None:
        """The state of a row, or None if the row is free."""
        return self._states[row]

    def apply(self, plan: StepPlan) -> None:
        """Bring the rows up to date with a plan; must run before the plan's step."""
        for row in plan.freed_rows:
            self._modes[self[row].mode] -= 1
            self._states[row] = None
            self._num_blocks[row] = 0
        for new in plan.new_rows:
            self._enter(new)
        for delta in plan.block_deltas:
            self._append_blocks(delta.row, delta.block_ids)

    def stage_step(self, rows: IntArray, starts: IntArray, samples: IntArray, prefix: int) -> None:
        """Write the step's batch to the device; arrays that are there already are not sent again."""
        batch = {
            "step_rows": rows, "step_starts": starts, "step_samples": samples,
            "step_prefix": np.array([prefix], np.int32),
        }  # fmt: skip
        for name, values in batch.items():
            known = self._staged.get(name)
            if known is None or not np.array_equal(known[: len(values)], values):
                self._staged[name] = values
                self._writer.write(self._arena.offsets[name], values)

    def flush(self) -> None:
        """Let work that is launched from now on see all changes."""
        self._writer.flush()

    def dry_run(self) -> None:
        """Launch what `flush` launches, without a change."""
        self._writer.dry_run()

    def _enter(self, new: NewRow) -> None:
        row, offsets, writer = new.row, self._arena.offsets, self._writer
        writer.write(offsets["token_ids"] + row * self.token_ids.shape[1], new.token_ids)
        writer.write(offsets["num_computed"] + row, [new.num_computed_tokens])
        writer.write(offsets["params"] + row * NUM_PARAMS, _params(new))
        self._num_blocks[row] = 0
        self._append_blocks(row, new.block_ids)
        self.positions[row] = new.num_computed_tokens
        mode = mode_of(new)
        self._modes[mode] += 1
        self._states[row] = RowState(
            new.num_prompt_tokens,
            new.sampling,
            new.seed,
            new.stop_token_ids,
            LogitRules.build(new, self._vocab_size, self.device) if self.device.type == "cpu" else NO_RULES,
            mode,
        )

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        start = self._num_blocks[row]
        self._num_blocks[row] = start + len(block_ids)
        dest = self._arena.offsets["block_table"] + row * self.block_table.shape[1] + start
        self._writer.write(dest, block_ids)


def _params(new: NewRow) -> list[int]:
    sampling = new.sampling
    return pack(
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
        seed=new.seed,
        repetition=sampling.repetition_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        num_prompt=new.num_prompt_tokens,
        min_tokens=sampling.min_tokens,
    )
