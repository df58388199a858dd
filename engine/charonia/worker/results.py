"""How sampled tokens reach the host, and what a finished step brings."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from charonia_kernels.draw_outcome import DrawOutcome

from charonia.core.step import StepResult
from charonia.worker.batch import StepLayout
from charonia.worker.pooling import PendingEmbeddings
from charonia.worker.prompt_logprobs import PromptLogprobs
from charonia.worker.sampling import LogprobsResult

_NUM_BUFFERS = 4
"""Steps whose tokens may be on their way at once; lookahead needs two."""


class PendingTokens(Protocol):
    """Tokens on their way to the host."""

    def wait(self) -> tuple[list[int], list[int]]:
        """The step's tokens and their `DrawOutcome`s, by entry; blocks until they are there."""

    def device_seconds(self) -> float | None:
        """How long the device worked on the step, once `wait` has returned; None if nobody measured."""


@dataclass(frozen=True, slots=True)
class HostTokens:
    """Tokens of a CPU step, which has run by the time that it is launched."""

    tokens: torch.Tensor
    outcomes: torch.Tensor

    def wait(self) -> tuple[list[int], list[int]]:
        """As `PendingTokens`."""
        return self.tokens.tolist(), self.outcomes.tolist()

    def device_seconds(self) -> float | None:
        """As `PendingTokens`: not measured."""
        return None


@dataclass(frozen=True, slots=True)
class CopiedTokens:
    """Tokens on their way into pinned memory. begun and copied: when the step began, and its tokens are there."""

    pinned: torch.Tensor
    begun: torch.Event
    copied: torch.Event
    num_entries: int

    def wait(self) -> tuple[list[int], list[int]]:
        """As `PendingTokens`."""
        self.copied.synchronize()
        tokens, outcomes = self.pinned[:, : self.num_entries].tolist()
        return tokens, outcomes

    def device_seconds(self) -> float | None:
        """As `PendingTokens`."""
        milliseconds: float = self.begun.elapsed_time(self.copied)
        return milliseconds / 1000.0


class TokenOutbox:
    """Device memory that steps write their tokens to, and pinned memory that they are copied into.

    tokens, outcomes: [max_num_seqs] int32 on the device, at fixed addresses.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._device_side = torch.zeros((2, max_num_seqs), dtype=torch.int32, device=device)
        self.tokens, self.outcomes = self._device_side
        shape = (2, max_num_seqs)
        self._pinned = [torch.zeros(shape, dtype=torch.int32, pin_memory=True) for _ in range(_NUM_BUFFERS)]
        self._begun = [torch.Event("cuda", enable_timing=True) for _ in range(_NUM_BUFFERS)]
        self._copied = [torch.Event("cuda", enable_timing=True) for _ in range(_NUM_BUFFERS)]
        self._next = 0

    def begin(self) -> None:
        """A step's device work begins here."""
        self._begun[self._next].record()

    def send(self, num_entries: int) -> CopiedTokens:
        """Start the copy of what the step just launched will have written."""
        index, self._next = self._next, (self._next + 1) % _NUM_BUFFERS
        self._pinned[index].copy_(self._device_side, non_blocking=True)
        self._copied[index].record()
        return CopiedTokens(self._pinned[index], self._begun[index], self._copied[index], num_entries)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step whose device work has been issued; `wait` blocks until it has run."""

    step_id: int
    layout: StepLayout
    tokens: PendingTokens
    logprobs: LogprobsResult | None
    prompt_logprobs: PromptLogprobs | None
    embeddings: PendingEmbeddings | None = None

    def wait(self) -> StepResult:
        """What the step brought."""
        tokens, outcomes = self.tokens.wait()
        layout = self.layout
        if not layout.decodes_only:
            sampling = np.flatnonzero(layout.samples).tolist()
            tokens, outcomes = [tokens[i] for i in sampling], [outcomes[i] for i in sampling]
        failed: list[int] = []
        excluded: list[int] = []
        if any(outcomes):
            rows = layout.rows[layout.samples != 0].tolist()
            for row, outcome in zip(rows, outcomes, strict=True):
                if outcome != DrawOutcome.DRAWN:
                    (excluded if outcome == DrawOutcome.EXCLUDED else failed).append(row)
        embeddings: dict[int, bytes] = {}
        if self.embeddings is not None:
            embeddings, not_finite = self.embeddings.collect()
            failed += not_finite
        return StepResult(
            self.step_id,
            tokens,
            {} if self.logprobs is None else self.logprobs.collect(),
            {} if self.prompt_logprobs is None else self.prompt_logprobs.collect(),
            failed,
            self.tokens.device_seconds(),
            embeddings,
            excluded,
        )
