"""Log-probabilities of prompt tokens, computed chunk by chunk while the prompt is prefilled."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from charonia_kernels import Logprobs, logprobs

from charonia.outputs import TokenLogprobs
from charonia.worker.batch import StepLayout
from charonia.worker.logprobs import scores_sent_to_host, sent_to_host, token_logprobs
from charonia.worker.rows import RequestRows

POSITIONS_AT_ONCE = 128
"""Positions whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True, slots=True)
class _Part:
    row: int
    count: int
    tokens: torch.Tensor
    scores: Logprobs


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """One step's share of them, on its way to the host."""

    parts: list[_Part] = field(default_factory=list)

    @classmethod
    def compute(
        cls,
        layout: StepLayout,
        rows: RequestRows,
        hidden: torch.Tensor,
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> "PromptLogprobs":
        """Score the prompt tokens that follow the positions computed in this step. hidden: [T, H]."""
        parts: list[_Part] = []
        flat = layout.query_start_loc().tolist()
        for entry, row in enumerate(layout.rows.tolist()):
            state = rows[row]
            count = state.sampling.prompt_logprobs
            if count is None:
                continue
            first = int(layout.starts[entry])
            # Position p predicts token p + 1; the last prompt position predicts the first output token.
            length = min(int(layout.lengths[entry]), state.num_prompt - 1 - first)
            for offset in range(0, length, POSITIONS_AT_ONCE):
                size = min(POSITIONS_AT_ONCE, length - offset)
                logits = compute_logits(hidden[flat[entry] + offset :][:size])
                tokens = rows.token_ids[row, first + offset + 1 :][:size]
                scores = scores_sent_to_host(logprobs(logits, tokens, count))
                parts.append(_Part(row, count, sent_to_host(tokens.clone()), scores))
        return cls(parts)

    def collect(self) -> dict[int, list[TokenLogprobs]]:
        """By row, in the order of positions; for after the step has completed."""
        found: dict[int, list[TokenLogprobs]] = {}
        for part in self.parts:
            entries = token_logprobs(part.scores, part.tokens, [part.count] * len(part.tokens))
            found.setdefault(part.row, []).extend(entries)
        return found


def wanted(layout: StepLayout, rows: RequestRows) -> bool:
    """Whether a step computes positions whose prompt log-probabilities some row asks for."""
    return any(
        rows[row].sampling.prompt_logprobs is not None for row in layout.rows[layout.num_decodes :].tolist()
    )
