"""What a generation yields: frozen, typed, the same over every protocol."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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

    def extended(self, delta: "SequenceOutput") -> "SequenceOutput":
        """This output followed by the next delta of the same sequence."""
        return SequenceOutput(
            text=self.text + delta.text,
            finish_reason=delta.finish_reason or self.finish_reason,
            token_ids=_joined(self.token_ids, delta.token_ids),
            logprobs=_joined(self.logprobs, delta.logprobs),
            cumulative_logprob=_latest(self.cumulative_logprob, delta.cumulative_logprob),
            num_output_tokens=_summed(self.num_output_tokens, delta.num_output_tokens),
            stop_reason=self.stop_reason if delta.stop_reason is None else delta.stop_reason,
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
        joined: Output | None = None
        for chunk in chunks:
            joined = chunk if joined is None else _followed_by(joined, chunk)
        if joined is None:
            raise ValueError("no chunks to join")
        return cls(
            request_id=joined.request_id,
            model=joined.model,
            model_version=joined.model_version,
            sequences=joined.sequences,
            usage=joined.usage,
            timings=joined.timings,
            prompt_logprobs=joined.prompt_logprobs,
        )


def _followed_by(output: Output, chunk: StreamChunk) -> Output:
    usage = output.usage
    if usage is not None and chunk.usage is not None:
        usage = replace(usage, num_output_tokens=usage.num_output_tokens + chunk.usage.num_output_tokens)
    return replace(
        output,
        sequences=tuple(
            so_far.extended(delta) for so_far, delta in zip(output.sequences, chunk.sequences, strict=True)
        ),
        usage=usage,
        timings=chunk.timings or output.timings,
        prompt_logprobs=_latest(output.prompt_logprobs, chunk.prompt_logprobs),
    )


def _joined(first: tuple[_T, ...] | None, second: tuple[_T, ...] | None) -> tuple[_T, ...] | None:
    return second if first is None else first if second is None else first + second


def _summed(first: int | None, second: int | None) -> int | None:
    return second if first is None else first if second is None else first + second


def _latest(first: _T | None, second: _T | None) -> _T | None:
    return first if second is None else second
