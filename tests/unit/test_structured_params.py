"""What a request may ask about the form of its output, and what is refused before anything is compiled."""

import json
from typing import Any

import msgspec
import pytest
from charonia import SamplingParams, StructuredOutputsParams
from charonia.errors import InvalidRequestError
from charonia.request import EngineRequest
from charonia.structured_params import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_REGEX_CHARS, MAX_SCHEMA_CHARS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("key", ["structured_outputs", "guided_decoding"])
@pytest.mark.parametrize(
    "value",
    [{"json": SCHEMA}, {"json": json.dumps(SCHEMA)}, {"regex": "a+"}, {"choice": ["a", "b"]},
     {"grammar": 'start: "a"'}, {"json_object": True}, {"json": SCHEMA, "whitespace_pattern": " ?"},
     {"json_object": True, "disable_any_whitespace": True}],
)  # fmt: skip
def test_objects_and_json_text(key: str, value: dict[str, Any]) -> None:
    expected = StructuredOutputsParams(**value)
    assert SamplingParams.from_mapping({key: value}).structured_outputs == expected
    with_nulls = json.dumps({**value, "backend": None})
    assert SamplingParams.from_mapping({key: with_nulls, "n": "2"}).structured_outputs == expected


def test_names_of_older_releases() -> None:
    values = {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?", "temperature": 0.5}
    params = SamplingParams.from_mapping(values)
    assert params.structured_outputs == StructuredOutputsParams(json=SCHEMA, whitespace_pattern=" ?")
    assert params.temperature == 0.5
    choice = SamplingParams.from_mapping({"guided_choice": '["a", "b"]'}).structured_outputs
    assert choice == StructuredOutputsParams(choice=["a", "b"])
    assert SamplingParams.from_mapping({"guided_json": None}) == SamplingParams()


def test_the_constructor_takes_an_object() -> None:
    given: Any = {"regex": "a+"}
    assert SamplingParams(structured_outputs=given).structured_outputs == StructuredOutputsParams(regex="a+")


def test_it_crosses_to_the_engine() -> None:
    constraint = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    request = EngineRequest(
        request_id=1, prompt_token_ids=[1], sampling=SamplingParams(structured_outputs=constraint), seed=0,
        max_tokens=1, arrival_time=0.0,
    )  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineRequest) == request


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({}, "exactly one of"),
        ({"json_object": False}, "exactly one of"),
        ({"json": SCHEMA, "regex": "a"}, "got json and regex"),
        ({"jsonn": SCHEMA}, "has no key 'jsonn'"),
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        (3, "must be an object"),
        ({"json": 5}, "must be a JSON schema"),
        ({"json": "{"}, "'json' is not valid JSON"),
        ({"json": "[]"}, "must be a JSON schema"),
        ({"json": nested(70)}, "nested too deeply"),
        ({"json": json.dumps(nested(70))}, "nested too deeply"),
        ({"json": '{"a":' + "[" * 100_000}, "not valid JSON"),
        ({"json": {"enum": ["x" * 100] * (MAX_SCHEMA_CHARS // 100)}}, "at most 131072"),
        ({"json": " " * (MAX_SCHEMA_CHARS + 1)}, "at most 131072"),
        ({"json": {"const": object()}}, "holds what JSON does not"),
        ({"json": {"maximum": float("nan")}}, "holds what JSON does not"),
        ({"json": {"maximum": float("inf")}}, "holds what JSON does not"),
        ({"json": {"const": b"x"}}, "holds what JSON does not"),
        ({"json": {"const": "\ud800"}}, "holds what JSON does not"),
        ({"regex": ""}, "non-empty"),
        ({"regex": 7}, "non-empty"),
        ({"regex": "a" * (MAX_REGEX_CHARS + 1)}, "at most 16384"),
        ({"regex": "\ud800"}, "valid Unicode"),
        ({"grammar": "x" * (1 << 20)}, f"at most {MAX_GRAMMAR_CHARS}"),
        ({"choice": []}, "non-empty list"),
        ({"choice": "yes"}, "non-empty list"),
        ({"choice": [""]}, "non-empty"),
        ({"choice": ["a", 1]}, "non-empty string"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, f"at most {MAX_CHOICES}"),
        ({"choice": ["a" * 1000] * 100}, "at most 65536"),
        ({"json_object": "yes"}, "must be a boolean"),
        ({"json": SCHEMA, "disable_any_whitespace": 1}, "must be a boolean"),
        ({"json": SCHEMA, "whitespace_pattern": "a" * 300}, "at most 256"),
    ],
)
def test_what_is_refused_at_once(value: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match="'structured_outputs'") as refused:
        SamplingParams.from_mapping({"structured_outputs": value})
    assert complaint in str(refused.value)


def test_stated_twice() -> None:
    for values in ({"guided_regex": "a", "structured_outputs": {"regex": "a"}},
                   {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "a"}}):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="stated twice"):
            SamplingParams.from_mapping(values)
    with pytest.raises(InvalidRequestError, match="got json and regex"):
        SamplingParams.from_mapping({"guided_regex": "a", "guided_json": SCHEMA})
