"""Sampling parameters: vLLM's names and defaults, casts of loosely typed values, errors that name the field."""

import math
from typing import Any

import msgspec
import pytest
from charonia.errors import InvalidRequestError, UnsupportedError
from charonia.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    SamplingParams,
)


def cast(key: str, value: Any) -> Any:
    return getattr(SamplingParams.from_mapping({key: value}), key)


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (
        1,
        1.0,
        1.0,
        0,
        16,
    )
    assert (params.stop, params.seed, params.logprobs, params.detokenize) == ([], None, None, True)
    assert SamplingParams.from_mapping({}) == params


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("temperature", "0.1", 0.1),
        ("temperature", 0, 0.0),
        ("temperature", "1", 1.0),
        ("max_tokens", "100", 100),
        ("max_tokens", 8.0, 8),
        ("max_tokens", "8.0", 8),
        ("min_p", "0.05", 0.05),
        ("top_k", "-1", -1),
        ("seed", "-12", -12),
        ("seed", -1, None),
        ("logprobs", "5", 5),
        ("ignore_eos", "false", False),
        ("ignore_eos", "TRUE", True),
        ("ignore_eos", 1, True),
        ("ignore_eos", "0", False),
        ("stop", "x", ["x"]),
        ("stop", ["a", "b"], ["a", "b"]),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("stop", "[]", []),
        ("bad_words", "x", ["x"]),
        ("stop_token_ids", 5, [5]),
        ("stop_token_ids", "5", [5]),
        ("stop_token_ids", "[5, 6]", [5, 6]),
        ("stop_token_ids", ["5"], [5]),
        ("allowed_token_ids", "[1, 2]", [1, 2]),
        ("logit_bias", {"5": 1}, {5: 1.0}),
        ("logit_bias", '{"5": "1.5", "7": -2}', {5: 1.5, 7: -2.0}),
    ],
)
def test_casts(key: str, value: Any, expected: Any) -> None:
    found = cast(key, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "text", ["{}", "{", "[", "[1]", '["a", 1]', '{"a": 1}', "5", "null", '"x"', "[" * 900]
)
def test_stop_strings_that_look_like_json(text: str) -> None:
    assert cast("stop", text) == [text]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", True),
        ("temperature", "nan"),
        ("temperature", math.inf),
        ("temperature", "1e400"),
        ("temperature", 10**400),
        ("temperature", "warm"),
        ("temperature", [1.0]),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", "1.001"),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 2**70),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 100.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "-3"),
        ("n", 0),
        ("n", MAX_N + 1),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", ""),
        ("max_tokens", "null"),
        ("max_tokens", 1e300),
        ("max_tokens", 2**31),
        ("min_tokens", 17),
        ("min_tokens", -1),
        pytest.param("temperature", 10**5000, id="a temperature that Python does not write"),
        pytest.param("n", 10**5000, id="an n that Python does not write"),
        pytest.param("stop_token_ids", [10**5000], id="an id that Python does not write"),
        ("seed", 2**63),
        ("seed", False),
        ("logprobs", True),
        ("logprobs", MAX_LOGPROBS + 1),
        ("prompt_logprobs", -1),
        ("ignore_eos", 2),
        ("ignore_eos", "yes"),
        ("detokenize", []),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", {"a": 1}),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
        ("stop", "x" * 5000),
        ("stop", "\ud800"),
        ("bad_words", ["\udfff"]),
        ("temperature", "\ud800"),
        ("stop_token_ids", "\ud800"),
        ("bad_words", ["word"] * 10_000),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [[1]]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", list(range(5000))),
        ("allowed_token_ids", []),
        ("allowed_token_ids", "none"),
        ("allowed_token_ids", [1] * (MAX_ALLOWED_TOKEN_IDS + 1)),
        ("logit_bias", [1]),
        ("logit_bias", "5"),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": math.nan}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(i): 1 for i in range(2000)}),
    ],
)
def test_bad_values_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"'{key}' must be") as error:
        SamplingParams.from_mapping({key: value})
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("key", [f.name for f in msgspec.structs.fields(SamplingParams)])
def test_nulls_are_ignored(key: str) -> None:
    assert SamplingParams.from_mapping({key: None}) == SamplingParams()


def test_unknown_keys_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown sampling parameter 'tempreature'.*temperature"):
        SamplingParams.from_mapping({"tempreature": 1.0})


@pytest.mark.parametrize("key", ["lora_name", "best_of"])
def test_what_is_not_supported_says_so(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        SamplingParams.from_mapping({key: "x"})
    assert SamplingParams.from_mapping({key: None}) == SamplingParams()


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="'detokenize' must be true when 'stop'"):
        SamplingParams(detokenize=False, stop="x")  # type: ignore[arg-type]


def test_constructor_takes_what_vllm_takes() -> None:
    assert SamplingParams(stop="x").stop == ["x"]  # type: ignore[arg-type]
    none: Any = None
    empty = SamplingParams(stop=none, stop_token_ids=none, bad_words=none, logit_bias=none)
    assert empty == SamplingParams()
    assert SamplingParams(temperature=0).greedy and not SamplingParams().greedy
    assert SamplingParams(max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": True}, {"temperature": "1"}, {"temperature": 10**400}, {"top_p": None}, {"seed": 1.0},
     {"n": "2"}, {"stop_token_ids": {1}}, {"logit_bias": {5: "1"}}, {"ignore_eos": 1}],
)  # fmt: skip
def test_constructor_is_strict(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"'{next(iter(wrong))}' must be"):
        SamplingParams(**wrong)


def test_survives_the_wire() -> None:
    params = SamplingParams(
        temperature=0,
        stop=["a"],
        logit_bias={3: -1},
        allowed_token_ids=[3, 4],
        max_tokens=None,
        seed=-(2**63),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_what_openai_frontends_send_besides() -> None:
    given = {"best_of": 1, "logprobs": False, "prompt_logprobs": False, "temperature": 1.0}
    assert SamplingParams.from_mapping(given) == SamplingParams()
    assert SamplingParams.from_mapping({"best_of": "2", "n": 2}) == SamplingParams(n=2)
    with pytest.raises(UnsupportedError, match="'best_of'"):
        SamplingParams.from_mapping({"best_of": 4, "n": 2})
