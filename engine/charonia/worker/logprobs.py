"""Log-probabilities on their way from the device to requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from charonia_kernels import Logprobs

from charonia.outputs import TokenLogprobs


def token_logprobs(scores: Logprobs, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """The scores of `tokens` [N], each with its `counts[i]` most likely alternatives."""
    token_list, own, ranks = tokens.tolist(), scores.own.tolist(), scores.rank.tolist()
    top_ids, top_values = scores.top_ids.tolist(), scores.top_values.tolist()
    return [
        TokenLogprobs([token_list[i], *top_ids[i][:k]], [own[i], *top_values[i][:k]], ranks[i])
        for i, k in enumerate(counts)
    ]


def sent_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, pinned and still under way if the tensor is on a GPU: there once the step has completed."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def scores_sent_to_host(scores: Logprobs) -> Logprobs:
    """All of them, as `sent_to_host`."""
    return Logprobs(
        sent_to_host(scores.own),
        sent_to_host(scores.rank),
        sent_to_host(scores.top_ids),
        sent_to_host(scores.top_values),
    )


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Those of one step's tokens, of the rows that ask. tokens: [N], scores: of them; both on their way to the host."""

    rows: list[int]
    counts: list[int]
    tokens: torch.Tensor
    scores: Logprobs

    def collect(self) -> dict[int, TokenLogprobs]:
        """By row; for after the step has completed."""
        return dict(zip(self.rows, token_logprobs(self.scores, self.tokens, self.counts), strict=True))
