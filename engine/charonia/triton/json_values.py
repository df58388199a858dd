"""JSON from clients, decoded with its faults named."""

from collections.abc import Mapping
from typing import Any

import msgspec

from charonia.errors import InvalidRequestError
from charonia.triton.contract import MAX_JSON_DEPTH


def decode_json(data: bytes, what: str) -> Any:
    """Decode JSON of bounded depth. Raises `InvalidRequestError` that begins with `what`."""
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise InvalidRequestError(
            f"{what}: JSON nested too deeply, at most {MAX_JSON_DEPTH} levels are taken"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{what}: not valid JSON: {error}") from None
    # No deeper than it has brackets: a walk through all of it is for the few that have many.
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and _deeper_than(value, MAX_JSON_DEPTH):
        raise InvalidRequestError(
            f"{what}: JSON nested too deeply, at most {MAX_JSON_DEPTH} levels are taken"
        )
    return value


def decode_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Decode a JSON object. Raises `InvalidRequestError` that begins with `what`."""
    value = decode_json(data, what)
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{what}: must be a JSON object")
    return value


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that have a value: clients send null for "not given"."""
    return {key: value for key, value in values.items() if value is not None}


def _deeper_than(value: object, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            child
            for node in layer
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not layer:
            return False
    return True
