"""Log-probabilities of chosen tokens, their ranks, and those of the most likely tokens."""

from dataclasses import dataclass

import torch

from charonia_kernels.reference._dtype import compute_dtype


@dataclass(frozen=True, slots=True)
class Logprobs:
    """own: ``[N]`` fp32. rank: ``[N]`` int32, 1 for the most likely token.

    top_ids: ``[N, k]`` int32, most likely first. top_values: ``[N, k]`` fp32.
    """

    own: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, max_count: int) -> Logprobs:
    """Log-probabilities of `tokens` and of each row's likeliest ones.

    Args:
        logits: ``[N, V]``, unmodified.
        tokens: ``[N]``, in the vocabulary.
        max_count: how many of the most likely tokens to report; k is that, but V at most.

    Returns:
        In fp32, or fp64 for fp64 logits.
    """
    wide = logits.to(compute_dtype(logits))
    index = tokens.long()[:, None]
    rank = (wide > wide.gather(-1, index)).sum(dim=-1) + 1
    values = wide.log_softmax(dim=-1)
    top = wide.topk(min(max_count, logits.shape[-1]), dim=-1)
    return Logprobs(
        values.gather(-1, index)[:, 0], rank.int(), top.indices.int(), values.gather(-1, top.indices)
    )
