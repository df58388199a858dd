"""How a step's tokens are drawn, on either kind of device."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from charonia_kernels.draw_outcome import DrawOutcome

from charonia.core.step import StepPlan, TokenMasks
from charonia.outputs import TokenLogprobs
from charonia.worker.batch import InputBatch, StepLayout
from charonia.worker.rows import RequestRows
from charonia.worker.sampler import sample
from charonia.worker.sampling_mode import SamplingMode
from charonia.worker.token_masks import allowed_tokens


class LogprobsResult(Protocol):
    """Log-probabilities that may still be on their way to the host."""

    def collect(self) -> dict[int, TokenLogprobs]:
        """By row; for after the step has completed."""


@dataclass(frozen=True, slots=True)
class Draw:
    """tokens, outcomes: [B] integers. A token is meaningless where its outcome (of `DrawOutcome`) is not `DRAWN`; both
    are so for entries that do not sample. logprobs: of the rows that ask.
    """

    tokens: torch.Tensor
    outcomes: torch.Tensor
    logprobs: LogprobsResult | None = None


class Sampler(Protocol):
    """Draws one token per entry of a batch."""

    def apply(self, plan: StepPlan) -> None:
        """Take note of rows that come and go, after the rows have."""

    def mode(self) -> SamplingMode:
        """What the rows in use ask for."""

    def draw(self, logits: torch.Tensor, batch: InputBatch, mode: SamplingMode) -> Draw:
        """Draw from `logits [B, V]` without the host: PLAIN or FILTERED."""

    def draw_full(
        self, logits: torch.Tensor, batch: InputBatch, layout: StepLayout, masks: TokenMasks | None
    ) -> Draw:
        """Draw with everything that the rows ask for. masks: of rows that follow a grammar."""

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

    def draw_full(
        self, logits: torch.Tensor, batch: InputBatch, layout: StepLayout, masks: TokenMasks | None
    ) -> Draw:
        """As `Sampler`."""
        nothing = self.nothing(layout.num_entries)
        tokens, outcomes = nothing.tokens, nothing.outcomes
        sampled = layout.sampled()
        if not sampled:
            return nothing
        entries = torch.from_numpy(np.flatnonzero(layout.samples))
        allowed = {} if masks is None else allowed_tokens(masks, logits.shape[-1])
        output = sample(logits[entries], self._rows, sampled, allowed)
        tokens[entries] = output.tokens
        outcomes[entries] = output.outcomes
        by_row = {sampled[i].row: entry for i, entry in output.logprobs.items()}
        return Draw(tokens, outcomes, KnownLogprobs(by_row))

    @staticmethod
    def nothing(num_entries: int) -> Draw:
        """The draw of a step in which no entry samples."""
        outcomes = torch.full((num_entries,), DrawOutcome.DRAWN, dtype=torch.int32)
        return Draw(torch.zeros(num_entries, dtype=torch.int64), outcomes)

    def dry_run(self, logits: torch.Tensor, batch: InputBatch) -> None:
        """There is nothing to compile."""
