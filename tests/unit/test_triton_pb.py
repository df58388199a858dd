"""The quick way to serialise one string, beside what the stub's own module does."""

import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from charonia.triton.outputs import encode_strings
from charonia.triton.pb import quicken_strings


def serialize(array: Any) -> Any:
    """As in the stub's module: a length of four bytes, little endian, then the bytes; `()` for nothing."""
    if array.size == 0:
        return ()
    items = [item if type(item) is bytes else str(item).encode() for item in array.ravel().tolist()]
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


@pytest.mark.parametrize(
    "values", [[], [b""], [b"word"], [b"a\0"], [b"\xff" * 300], ["text"], ["\u00e9"], [b"a", b"", "c"], [7]]
)
def test_strings_are_serialised_as_the_stub_does(values: list[Any]) -> None:
    module = SimpleNamespace(serialize_byte_tensor=serialize)
    quicken_strings(module)
    assert module.serialize_byte_tensor is not serialize
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    assert module.serialize_byte_tensor(array) == serialize(array)
    assert module.serialize_byte_tensor(array.reshape(-1, 1)) == serialize(array)


def test_what_responses_hold_takes_the_quick_way() -> None:
    def count(array: Any) -> Any:
        seen.append(array)
        return serialize(array)

    seen: list[Any] = []
    module = SimpleNamespace(serialize_byte_tensor=count)
    quicken_strings(module)
    seen.clear()
    assert module.serialize_byte_tensor(encode_strings(["a word"])) == b"\x06\0\0\0a word"
    assert not seen
    assert module.serialize_byte_tensor(encode_strings(["a", "b"])) == b"\1\0\0\0a\1\0\0\0b"
    assert len(seen) == 1


def in_an_array(array: Any) -> Any:
    return np.array([serialize(array)], dtype=np.object_)


def with_long_lengths(array: Any) -> Any:
    return b"".join(struct.pack("<Q", len(item)) + item for item in array.tolist())


@pytest.mark.parametrize("other", [in_an_array, with_long_lengths, None])
def test_a_module_that_does_it_otherwise_stays_as_it_is(other: Any) -> None:
    module = SimpleNamespace() if other is None else SimpleNamespace(serialize_byte_tensor=other)
    quicken_strings(module)
    assert getattr(module, "serialize_byte_tensor", None) is other
