"""Log-probabilities on their way from the device to requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from charonia_kernels import Logprobs

from charonia.outputs import TokenLogprobs


def token_logprobs(scores: Logprobs, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Bring the scores of `tokens` [N] to the host, each with its `counts[i]` most likely alternatives."""
    token_list, own, ranks = tokens.tolist(), scores.own.tolist(), scores.rank.tolist()
    top_ids, top_values = scores.top_ids.tolist(), scores.top_values.tolist()
    return [
        TokenLogprobs([token_list[i], *top_ids[i][:k]], [own[i], *top_values[i][:k]], ranks[i])
        for i, k in enumerate(counts)
    ]


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Those of one step's tokens, of the rows that ask. tokens: [N]; scores: of them."""

    rows: list[int]
    counts: list[int]
    tokens: torch.Tensor
    scores: Logprobs

    def collect(self) -> dict[int, TokenLogprobs]:
        """By row; waits for the device."""
        return dict(zip(self.rows, token_logprobs(self.scores, self.tokens, self.counts), strict=True))
