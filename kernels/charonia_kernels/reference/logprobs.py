"""Log-probabilities of chosen tokens, their ranks, and those of the most likely tokens."""

import torch

from charonia_kernels.reference._dtype import compute_dtype


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, max_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of `tokens` and of each row's likeliest ones.

    Args:
        logits: ``[N, V]``, unmodified.
        tokens: ``[N]``, in the vocabulary.
        max_count: how many of the most likely tokens to report; k is that, but V at most.

    Returns:
        own ``[N]``; rank ``[N]`` int32, 1 for the most likely token; top_ids ``[N, k]`` int32, most likely first;
        top_values ``[N, k]``.
    """
    wide = logits.to(compute_dtype(logits))
    index = tokens.long()[:, None]
    rank = (wide > wide.gather(-1, index)).sum(dim=-1) + 1
    values = wide.log_softmax(dim=-1)
    top = wide.topk(min(max_count, logits.shape[-1]), dim=-1)
    return values.gather(-1, index)[:, 0], rank.int(), top.indices.int(), values.gather(-1, top.indices)
