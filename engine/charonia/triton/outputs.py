"""From the engine's outputs to response tensors: deltas of one request, gathered until a response leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from charonia.outputs import CompletionOutput, EmbeddingRequestOutput, PositionLogprobs, RequestOutput
from charonia.triton.inputs import ResponseOptions
from charonia.triton.pb import AnyArray

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

NOT_FINISHED = "None"
"""The output `finish_reason` of a sequence that goes on."""


@dataclass(slots=True)
class _Sequence:
    """What has gathered of one sequence since the last response; the last three outlive it."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str = NOT_FINISHED
    stop_reason: int | str | None = None


class ResponseAssembler:
    """Gathers a request's deltas and turns what has gathered into output tensors. Not thread-safe.

    Every array but `num_input_tokens`, `token_ids`, `timings` and `prompt_logprobs` has one element per sequence, in
    order; `token_ids` holds the sequences one after the other, `num_output_tokens` tells how many ids each has.
    `prompt_logprobs` is in the first response and "null" in all others.
    """

    def __init__(self, options: ResponseOptions, num_sequences: int) -> None:
        self._options = options
        self._sequences = [_Sequence() for _ in range(num_sequences)]
        self._last: RequestOutput | None = None
        self._told_prompt_logprobs = False
        self.num_sequences = num_sequences
        self.num_tokens = 0
        """Tokens gathered so far, over all sequences and responses."""

    def add(self, output: RequestOutput | EmbeddingRequestOutput) -> None:
        """Take a delta."""
        assert isinstance(output, RequestOutput)
        self._last = output
        for item in output.outputs:
            self._add_sequence(self._sequences[item.index], item)

    def _add_sequence(self, sequence: _Sequence, item: CompletionOutput) -> None:
        if item.text:
            # NUL ends a string in clients written in C.
            sequence.texts.append(item.text.replace("\0", "") if "\0" in item.text else item.text)
        self.num_tokens += len(item.token_ids)
        sequence.token_ids.extend(item.token_ids)
        sequence.logprobs.extend(item.logprobs or ())
        sequence.cumulative_logprob = item.cumulative_logprob
        if item.finish_reason is not None:
            sequence.finish_reason = item.finish_reason.value
            sequence.stop_reason = item.stop_reason

    @property
    def last(self) -> RequestOutput | None:
        """The latest delta."""
        return self._last

    @property
    def finished(self) -> bool:
        """Whether the last delta is in."""
        return self._last is not None and self._last.finished

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Of the sequences that have ended."""
        return tuple(s.finish_reason for s in self._sequences if s.finish_reason != NOT_FINISHED)

    @property
    def has_content(self) -> bool:
        """Whether a response now would show the client something new."""
        if self._options.tokens_are_content:
            return any(sequence.token_ids for sequence in self._sequences)
        return any(text for sequence in self._sequences for text in sequence.texts)

    def take(self) -> dict[str, AnyArray]:
        """The output tensors of all that has gathered, which is then forgotten."""
        assert self._last is not None
        echo = self._last.prompt or "" if self._options.echo else ""
        arrays: dict[str, AnyArray] = {
            "text_output": encode_strings([echo + "".join(s.texts) for s in self._sequences])
        }
        for name in self._options.outputs:
            arrays[name] = self._optional(name, self._last)
        for sequence in self._sequences:
            sequence.texts.clear()
            sequence.token_ids.clear()
            sequence.logprobs.clear()
        return arrays

    def _optional(self, name: str, last: RequestOutput) -> AnyArray:
        sequences = self._sequences
        match name:
            case "finish_reason":
                return encode_strings([s.finish_reason for s in sequences])
            case "cumulative_logprob":
                return np.array([s.cumulative_logprob for s in sequences], np.float32)
            case "logprobs":
                return encode_strings([self._logprobs(s) for s in sequences])
            case "num_input_tokens":
                return np.array([len(last.prompt_token_ids)], np.uint32)
            case "num_output_tokens":
                return np.array([len(s.token_ids) for s in sequences], np.uint32)
            case "token_ids":
                return np.array([token for s in sequences for token in s.token_ids], np.int32)
            case "timings":
                return encode_strings([encode_timings(last)])
            case "prompt_logprobs":
                return encode_strings([self._prompt_logprobs(last)])
            case "stop_reason":
                return encode_strings([msgspec.json.encode(s.stop_reason) for s in sequences])
        raise AssertionError(f"no output named {name!r}")

    def _logprobs(self, sequence: _Sequence) -> bytes:
        return _encode_positions(sequence.logprobs) if self._options.wants_logprobs else b"null"

    def _prompt_logprobs(self, last: RequestOutput) -> bytes:
        if last.prompt_logprobs is None or self._told_prompt_logprobs:
            return b"null"
        self._told_prompt_logprobs = True
        return _encode_positions(last.prompt_logprobs)


def _encode_positions(positions: Sequence[PositionLogprobs | None]) -> bytes:
    """A JSON list of objects by token id; null for a position that nothing predicts."""
    return msgspec.json.encode([None if found is None else _by_token(found) for found in positions])


def _by_token(position: PositionLogprobs) -> dict[str, dict[str, Any]]:
    return {
        str(token_id): {
            "logprob": max(entry.logprob, _LOWEST_LOGPROB),
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in position.items()
    }


def encode_timings(output: RequestOutput | EmbeddingRequestOutput) -> bytes:
    """Durations in seconds since the request arrived; `total_s` is 0 until the last response."""
    return msgspec.json.encode(
        {
            "queue_s": output.timings.queue,
            "first_token_s": output.timings.first_token,
            "total_s": output.timings.total,
            "num_cached_tokens": output.num_cached_tokens,
        }
    )


def encode_strings(values: Sequence[str | bytes]) -> AnyArray:
    """One element a text, as bytes."""
    # An array of bytes built at once would have a fixed width and lose trailing zeros.
    array = np.empty(len(values), dtype=np.object_)
    for i, value in enumerate(values):
        array[i] = value if isinstance(value, bytes) else value.encode()
    return array
