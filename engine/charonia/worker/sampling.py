"""How a step's tokens are drawn, on either kind of device."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from charonia.core.step import StepPlan
from charonia.outputs import TokenLogprobs
from charonia.worker.batch import InputBatch, StepLayout
from charonia.worker.rows import RequestRows
from charonia.worker.sampler import sample
from charonia.worker.sampling_mode import SamplingMode


class LogprobsResult(Protocol):
    """Log-probabilities that may still be on their way to the host."""

    def collect(self) -> dict[int, TokenLogprobs]:
        """By row; for after the step has completed."""


@dataclass(frozen=True, slots=True)
class Draw:
    """tokens, ok: [B] integers. `ok` is 0 where the logits are not finite or every token is excluded; the token is then
    meaningless, as it is for entries that do not sample. logprobs: of the rows that ask.
    """

    tokens: torch.Tensor
    ok: torch.Tensor
    logprobs: LogprobsResult | None = None


class Sampler(Protocol):
    """Draws one token per entry of a batch."""

    def apply(self, plan: StepPlan) -> None:
        """Take note of rows that come and go, after the rows have."""

    def mode(self) -> SamplingMode:
        """What the rows in use ask for."""

    def draw(self, logits: torch.Tensor, batch: InputBatch, mode: SamplingMode) -> Draw:
        """Draw from `logits [B, V]` without the host: PLAIN or FILTERED."""

    def draw_full(self, logits: torch.Tensor, batch: InputBatch, layout: StepLayout) -> Draw:
        """Draw with everything that the rows ask for."""

    def dry_run(self, logits: torch.Tensor, batch: InputBatch) -> None:
        """Launch everything that `draw_full` may launch."""


@dataclass(frozen=True, slots=True)
class KnownLogprobs:
    """Log-probabilities that are on the host already."""

    by_row: dict[int, TokenLogprobs]

    def collect(self) -> dict[int, TokenLogprobs]:
        """As `LogprobsResult`."""
        return self.by_row


class HostSampler:
    """The CPU's sampler, on PyTorch operators: `charonia.worker.sampler`."""

    def __init__(self, rows: RequestRows) -> None:
        self._rows = rows

    def apply(self, plan: StepPlan) -> None:
        """The rows know all that is needed."""

    def mode(self) -> SamplingMode:
        """Always FULL: there are no graphs to keep the host out of."""
        return SamplingMode.FULL

    def draw(self, logits: torch.Tensor, batch: InputBatch, mode: SamplingMode) -> Draw:
        """Never asked for."""
        raise NotImplementedError("the host's sampler draws in FULL mode only")

    def draw_full(self, logits: torch.Tensor, batch: InputBatch, layout: StepLayout) -> Draw:
        """As `Sampler`."""
        tokens = torch.zeros(layout.num_entries, dtype=torch.int64, device=logits.device)
        ok = torch.ones(layout.num_entries, dtype=torch.bool, device=logits.device)
        sampled = layout.sampled()
        if not sampled:
            return Draw(tokens, ok)
        entries = torch.from_numpy(np.flatnonzero(layout.samples))
        output = sample(logits[entries], self._rows, sampled)
        tokens[entries] = output.tokens
        ok[entries] = output.usable
        by_row = {sampled[i].row: entry for i, entry in output.logprobs.items()}
        return Draw(tokens, ok, KnownLogprobs(by_row))

    def dry_run(self, logits: torch.Tensor, batch: InputBatch) -> None:
        """There is nothing to compile."""
