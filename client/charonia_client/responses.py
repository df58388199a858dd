"""From a model's output tensors to typed results, independent of the protocol."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from charonia_client.errors import InternalServerError
from charonia_client.results import (
    GenerateResult,
    Logprob,
    Output,
    PositionLogprobs,
    SequenceOutput,
    Timings,
    Usage,
)

OutputT = TypeVar("OutputT", bound=Output)

NOT_FINISHED = "None"
"""The output `finish_reason` of a sequence that goes on."""


@dataclass(frozen=True, slots=True)
class ModelResponse:
    """One response of the model. outputs: flattened values of each output tensor, by name."""

    model: str
    model_version: str
    request_id: str
    outputs: Mapping[str, Sequence[Any]]


def parse(kind: type[OutputT], response: ModelResponse, *, url: str) -> OutputT:
    """Turn a response into a `StreamChunk` or a `GenerateResult`.

    Raises `InternalServerError` if the outputs are not those of the serving contract.
    """
    try:
        return kind(
            request_id=response.request_id,
            model=response.model,
            model_version=response.model_version,
            sequences=_sequences(response.outputs),
            usage=_usage(response.outputs),
            timings=_timings(response.outputs),
            prompt_logprobs=_prompt_logprobs(response.outputs),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InternalServerError(
            f"the model's response does not follow the serving contract: {error!r}",
            url=url,
            model=response.model,
        ) from error


def single(responses: Sequence[ModelResponse], *, url: str, model: str) -> GenerateResult:
    """The result of a request that is answered at once. Raises `InternalServerError` unless there is one
    response.
    """
    if len(responses) != 1:
        message = f"expected one response to a request that does not stream, got {len(responses)}"
        raise InternalServerError(message, url=url, model=model)
    return parse(GenerateResult, responses[0], url=url)


def _sequences(outputs: Mapping[str, Sequence[Any]]) -> tuple[SequenceOutput, ...]:
    texts = outputs["text_output"]
    count = len(texts)
    if count == 0:
        raise ValueError("text_output is empty")
    reasons = _per_sequence(outputs, "finish_reason", count)
    logprobs = _per_sequence(outputs, "logprobs", count)
    totals = _per_sequence(outputs, "cumulative_logprob", count)
    lengths = _per_sequence(outputs, "num_output_tokens", count)
    stop_reasons = _per_sequence(outputs, "stop_reason", count)
    ids = _split_token_ids(outputs.get("token_ids"), lengths)
    return tuple(
        SequenceOutput(
            text=texts[i],
            finish_reason=None if reasons[i] == NOT_FINISHED else reasons[i],
            token_ids=ids[i],
            logprobs=_logprobs(logprobs[i]),
            cumulative_logprob=totals[i],
            num_output_tokens=lengths[i],
            stop_reason=None if stop_reasons[i] is None else json.loads(stop_reasons[i]),
        )
        for i in range(count)
    )


def _per_sequence(outputs: Mapping[str, Sequence[Any]], name: str, count: int) -> Sequence[Any]:
    values = outputs.get(name)
    if values is None:
        return (None,) * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} elements for {count} sequences")
    return values


def _split_token_ids(flat: Sequence[int] | None, lengths: Sequence[Any]) -> list[tuple[int, ...] | None]:
    """Cut the ids of all sequences, which come as one tensor, at each sequence's own length."""
    if flat is None:
        return [None] * len(lengths)
    if len(lengths) == 1:
        return [tuple(flat)]
    if sum(lengths) != len(flat):
        raise ValueError(f"token_ids has {len(flat)} elements, num_output_tokens says {lengths}")
    split: list[tuple[int, ...] | None] = []
    start = 0
    for length in lengths:
        split.append(tuple(flat[start : start + length]))
        start += length
    return split


def _logprobs(text: str | None) -> tuple[PositionLogprobs, ...] | None:
    positions = None if text is None else json.loads(text)
    return None if positions is None else tuple(map(_position, positions))


def _prompt_logprobs(outputs: Mapping[str, Sequence[Any]]) -> tuple[PositionLogprobs | None, ...] | None:
    positions = json.loads(outputs["prompt_logprobs"][0]) if "prompt_logprobs" in outputs else None
    if positions is None:
        return None
    return tuple(None if position is None else _position(position) for position in positions)


def _position(position: Mapping[str, Mapping[str, Any]]) -> PositionLogprobs:
    return {
        int(token_id): Logprob(entry["logprob"], entry["rank"], entry["decoded_token"])
        for token_id, entry in position.items()
    }


def _usage(outputs: Mapping[str, Sequence[Any]]) -> Usage | None:
    if "num_input_tokens" not in outputs or "num_output_tokens" not in outputs:
        return None
    return Usage(outputs["num_input_tokens"][0], sum(outputs["num_output_tokens"]))


def _timings(outputs: Mapping[str, Sequence[Any]]) -> Timings | None:
    if "timings" not in outputs:
        return None
    values = json.loads(outputs["timings"][0])
    return Timings(**{name: values.get(name) for name in Timings.__dataclass_fields__})
