"""What a generation yields: frozen, typed, the same over every protocol."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Logprob:
    """One alternative at one position. rank: 1-based among the whole vocabulary."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = Mapping[int, Logprob]
"""Alternatives at one position by token id; the token itself comes first."""


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One of the ``n`` sequences: whole in a `GenerateResult`, what is new of it in a `StreamChunk`.

    finish_reason: None until the sequence ends, then "stop", "length", ... token_ids, logprobs and
    cumulative_logprob (a running total) are None unless asked for; num_output_tokens is None when the server
    does not report it. stop_reason: the stop string or stop token id that ended it, if it was asked for; None
    where it ended otherwise.
    """

    text: str
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None
    cumulative_logprob: float | None = None
    num_output_tokens: int | None = None
    stop_reason: int | str | None = None

    @classmethod
    def from_deltas(cls, deltas: Sequence[Self]) -> Self:
        """Join the deltas of one sequence, in order."""
        stop_reasons = [delta.stop_reason for delta in deltas if delta.stop_reason is not None]
        return cls(
            text="".join(delta.text for delta in deltas),
            finish_reason=_last(delta.finish_reason for delta in deltas),
            token_ids=_joined([delta.token_ids for delta in deltas]),
            logprobs=_joined([delta.logprobs for delta in deltas]),
            cumulative_logprob=_last(delta.cumulative_logprob for delta in deltas),
            num_output_tokens=_summed([delta.num_output_tokens for delta in deltas]),
            stop_reason=stop_reasons[-1] if stop_reasons else None,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, or of one chunk of it (num_output_tokens is then that chunk's)."""

    num_input_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations in seconds from the server's receipt of the request, and how much of the prompt was
    cached.
    """

    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What results and chunks have in common. `text` and the like are those of the first sequence.

    prompt_logprobs: an entry for each token of the prompt, None for the first, which nothing predicts. None unless
    asked for, and in all chunks but the first.
    """

    request_id: str
    model: str
    model_version: str
    sequences: tuple[SequenceOutput, ...]
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """Text of the first sequence."""
        return self.sequences[0].text

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        """Token ids of the first sequence; None unless asked for."""
        return self.sequences[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first sequence ended; None while it has not."""
        return self.sequences[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or stop token id that ended the first sequence."""
        return self.sequences[0].stop_reason

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...] | None:
        """Log-probabilities of the first sequence; None unless asked for."""
        return self.sequences[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the first sequence so far; None unless asked for."""
        return self.sequences[0].cumulative_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChunk(Output):
    """What is new since the chunk before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult(Output):
    """A finished generation."""

    @classmethod
    def from_chunks(cls, chunks: Iterable[StreamChunk]) -> Self:
        """Join the chunks of one stream, in order. Raises ValueError if there are none."""
        parts = list(chunks)
        if not parts:
            raise ValueError("no chunks to join")
        by_sequence = zip(*(chunk.sequences for chunk in parts), strict=True)
        return cls(
            request_id=parts[0].request_id,
            model=parts[0].model,
            model_version=parts[0].model_version,
            sequences=tuple(SequenceOutput.from_deltas(deltas) for deltas in by_sequence),
            usage=_total([chunk.usage for chunk in parts]),
            timings=_last(chunk.timings for chunk in parts),
            prompt_logprobs=_last(chunk.prompt_logprobs for chunk in parts),
        )


def _total(usages: Sequence[Usage | None]) -> Usage | None:
    told = [usage for usage in usages if usage is not None]
    return (
        replace(told[0], num_output_tokens=sum(usage.num_output_tokens for usage in told)) if told else None
    )


def _last(values: Iterable[_T | None]) -> _T | None:
    """The last value that is not None."""
    last = None
    for value in values:
        last = last if value is None else value
    return last


def _joined(pieces: Sequence[tuple[_T, ...] | None]) -> tuple[_T, ...] | None:
    told = [piece for piece in pieces if piece is not None]
    return tuple(chain.from_iterable(told)) if told else None


def _summed(counts: Sequence[int | None]) -> int | None:
    told = [count for count in counts if count is not None]
    return sum(told) if told else None
