"""What a finished or running request yields. `RequestOutput` and its parts carry vLLM's names."""

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: entry 0 is the token itself, then the most likely tokens, best first.

    rank: 1-based rank of the token itself among the whole vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(slots=True)
class Logprob:
    """One alternative at one position."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]
"""Alternatives at one position by token id; the token itself comes first."""


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of a request: cumulative from `LLM.generate`, a delta when streamed.

    stop_reason: the stop string or stop token id that matched; None for the end-of-sequence token and for length.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class EmbeddingOutput:
    """embedding: one number a component, fp32 values."""

    embedding: list[float]


@dataclass(slots=True)
class RequestTimings:
    """Durations in seconds, from the moment the frontend received the request."""

    queue: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


@dataclass(slots=True)
class RequestOutput:
    """One request's output. prompt is None when the prompt came as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    timings: RequestTimings = field(default_factory=RequestTimings)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """One request's embedding; there is one such output a request. prompt_token_ids: what was embedded."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    timings: RequestTimings = field(default_factory=RequestTimings)
