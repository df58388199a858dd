"""The input `embedding_request`: what to embed and how, as clients of Triton's vLLM backend write it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from charonia.errors import InvalidRequestError
from charonia.pooling_params import PoolingParams
from charonia.triton.json_values import decode_json_object, without_nulls

EMBEDDING_OUTPUTS = frozenset({"finish_reason", "num_input_tokens", "num_output_tokens", "timings"})
"""The optional outputs that an embedding has."""

_KEYS = frozenset({"input", "pooling_params"})


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """A text or token ids, and how to embed them."""

    prompt: str | list[int]
    params: PoolingParams


def read_embedding_input(data: bytes) -> EmbeddingInput:
    """Decode `{"input": str or [int], "pooling_params": {...}}`. Raises `InvalidRequestError` that names the key."""
    values = without_nulls(decode_json_object(data, "input 'embedding_request'"))
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise InvalidRequestError(
            f"input 'embedding_request': unknown key {unknown[0][:80]!r}; known keys: {', '.join(sorted(_KEYS))}"
        )
    params = values.get("pooling_params", {})
    if not isinstance(params, dict):
        raise InvalidRequestError("input 'embedding_request': 'pooling_params' must be an object")
    return EmbeddingInput(_prompt(values.get("input")), PoolingParams.from_mapping(params))


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    raise InvalidRequestError(
        "input 'embedding_request': 'input' must be one text or a non-empty list of token ids; each further text needs "
        "a request of its own"
    )


def check_alone(
    inputs: Collection[str], text: bytes, settings: Mapping[str, Any], outputs: Collection[str]
) -> None:
    """Refuse what has no meaning for an embedding. Raises `InvalidRequestError` that names it.

    inputs: names of the request's inputs. text: `text_input`, which may be there and empty. settings: sampling and
    request parameters that are left over. outputs: optional outputs that are asked for.
    """
    other = next(
        (name for name in ("input_ids", "messages") if name in inputs), "text_input" if text else None
    )
    if other is not None:
        raise InvalidRequestError(
            f"inputs {other!r} and 'embedding_request' exclude each other: a request has one prompt"
        )
    if settings:
        raise InvalidRequestError(
            f"parameter {next(iter(settings))[:80]!r} has no meaning for an embedding request; 'pooling_params' go "
            "into its JSON"
        )
    missing = sorted(set(outputs) - EMBEDDING_OUTPUTS)
    if missing:
        raise InvalidRequestError(f"an embedding request has no output {missing[0]!r}")
