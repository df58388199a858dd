"""What rows ask of the sampler, in classes that cost differently."""

from enum import IntEnum

from charonia.core.step import NewRow
from charonia.sampling_params import SamplingParams


class SamplingMode(IntEnum):
    """What the rows of a batch ask for, at most; greater includes lesser."""

    PLAIN = 0
    """Greedy rows, and draws from the whole distribution at some temperature."""
    FILTERED = 1
    """Some rows have top_k, top_p or min_p."""
    FULL = 2
    """Some rows have penalties, constraints or logprobs: the host has a part in it, so it is never in a graph."""


def is_penalised(sampling: SamplingParams) -> bool:
    """Whether tokens lose by having been used."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def mode_of(new: NewRow) -> SamplingMode:
    """What one request asks for."""
    sampling = new.sampling
    constrained = (
        bool(sampling.logit_bias)
        or sampling.allowed_token_ids is not None
        or bool(new.bad_words)
        or (bool(new.stop_token_ids) and sampling.min_tokens > 0)
        or sampling.structured_outputs is not None
    )
    if is_penalised(sampling) or constrained or sampling.logprobs is not None:
        return SamplingMode.FULL
    if not sampling.greedy and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0):
        return SamplingMode.FILTERED
    return SamplingMode.PLAIN
