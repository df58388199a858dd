"""Per-request generation parameters, with the names and defaults that users of vLLM know."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import UnionType
from typing import Any, NamedTuple

import msgspec

from charonia.errors import InvalidRequestError, UnsupportedError
from charonia.structured_params import NAME as STRUCTURED
from charonia.structured_params import StructuredOutputsParams, gather_structured

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 19
GREEDY_TEMPERATURE = 1e-5


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How to continue one prompt. Raises `InvalidRequestError` that names the offending field.

    n: sequences to generate. temperature: 0 is greedy. top_k: 0 or -1 keeps all tokens. seed: makes the request
    reproducible whatever else is in its batch; with n > 1, sequence i uses seed + i; -1 is none. max_tokens: None
    generates up to the model's context length. logprobs / prompt_logprobs: how many alternatives to report per
    position (0 reports the token itself). min_tokens: stop conditions are ignored before that many tokens.
    structured_outputs: the form that the output must have. It ends where that form is complete, with finish reason
    "stop"; `ignore_eos` and `min_tokens` keep it going for as long as the form allows anything but the end.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    bad_words: list[str] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if _GET_CONTAINERS(self) != _NO_CONTAINERS:
            _complete_containers(self)
        if self.structured_outputs is not None:
            constraint = StructuredOutputsParams.from_value(self.structured_outputs)
            msgspec.structs.force_setattr(self, STRUCTURED, constraint)
        if self.seed == -1:
            msgspec.structs.force_setattr(self, "seed", None)
        _validate(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, the first of equals."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build from loosely typed values (JSON, Triton request parameters), casting strings to the field's type.

        Nulls are ignored. Raises `InvalidRequestError` for unknown keys and for values that do not fit, naming the key.
        """
        fields: dict[str, Any] = {}
        for key, value in gather_structured(values).items():
            kind = _FIELD_TYPES.get(key)
            if type(value) is kind:
                fields[key] = value  # as JSON has it nearly always
                continue
            if key == "best_of" and str(value) == str(values.get("n") or 1):
                continue  # as many as are returned: what older OpenAI frontends always send
            if value is False and key in ("logprobs", "prompt_logprobs"):
                continue  # OpenAI's chat API has a boolean of that name
            if key in _UNSUPPORTED:
                raise UnsupportedError(f"sampling parameter {key!r} is not supported: {_UNSUPPORTED[key]}")
            if kind is None:
                known = ", ".join(sorted(_FIELD_TYPES))
                raise InvalidRequestError(f"unknown sampling parameter {key!r}; known parameters: {known}")
            fields[key] = _cast(key, value, kind)
        return cls(**fields)


_UNSUPPORTED = {
    "best_of": "every sequence that is generated is returned; it may only equal 'n'",
    "lora_name": "this model serves no LoRA adapters",
}

_LIST_FIELDS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")


def _without_none(kind: Any) -> Any:
    """Nulls never reach a cast, and the text "null" is no number."""
    return kind.__args__[0] if isinstance(kind, UnionType) else kind


_FIELD_TYPES: dict[str, Any] = {f.name: _without_none(f.type) for f in msgspec.structs.fields(SamplingParams)}


def _cast(key: str, value: Any, kind: Any) -> Any:
    """Cast `value` to `kind`: strings to numbers and booleans, JSON text and single items to lists and mappings."""
    if key == STRUCTURED:
        return StructuredOutputsParams.from_value(value)
    given = value
    if isinstance(value, str) and (key in _LIST_FIELDS or key == "logit_bias"):
        value = _decode_json_container(value, kind)
    if key in _LIST_FIELDS and isinstance(value, str | int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str) and kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError):
        raise InvalidRequestError(
            f"sampling parameter {key!r} must be {_NAMES[kind]}, got {_shown(given, repr)}"
        ) from None


def _decode_json_container(text: str, kind: Any) -> Any:
    """The list or mapping that `text` is as JSON; `text` itself when it is none, as a stop string like "{" is."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return text
    if kind == list[str]:
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return value if is_list else text
    return value if isinstance(value, list | dict) else text


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list[str]: "a string or a list of strings",
    list[int]: "a list of token ids",
    dict[int, float]: "an object of token id to bias",
}


def _require(ok: bool, name: str, expectation: str, value: object) -> None:
    if not ok:
        raise InvalidRequestError(
            f"sampling parameter {name!r} must be {expectation}, got {_shown(value, str)}"
        )


def _shown(value: object, write: Callable[[object], str]) -> str:
    """The beginning of the value, written out."""
    try:
        return write(value)[:80]
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number that is too long to show"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Rule(NamedTuple):
    """What a scalar that is given must be: of a type, then within bounds; each with its words for the error."""

    is_type: Callable[[Any], bool]
    type_text: str
    holds: Callable[[Any], bool]
    text: str


def _integer(holds: Callable[[int], bool], text: str) -> _Rule:
    return _Rule(_is_int, "an integer", holds, text)


def _number(holds: Callable[[float], bool], text: str) -> _Rule:
    return _Rule(lambda v: _is_number(v) and abs(v) < math.inf, "a finite number", holds, text)


_BOOLEAN = _Rule(lambda v: isinstance(v, bool), "a boolean", lambda v: True, "")
_PENALTY = _number(lambda v: -2.0 <= v <= 2.0, "from -2 to 2")
_LOGPROBS = _integer(lambda v: 0 <= v <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")

_RULES = {
    "temperature": _number(lambda v: 0.0 <= v <= 100.0, "from 0 to 100"),
    "top_p": _number(lambda v: 0.0 < v <= 1.0, "in (0, 1]"),
    "min_p": _number(lambda v: 0.0 <= v <= 1.0, "from 0 to 1"),
    # Logits that are multiplied by it or divided stay far from what fp32 holds.
    "repetition_penalty": _number(lambda v: 0.01 <= v <= 100.0, "from 0.01 to 100"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "n": _integer(lambda v: 1 <= v <= MAX_N, f"from 1 to {MAX_N}"),
    "top_k": _integer(lambda v: -1 <= v < 2**31, "0 or -1 (all tokens) or positive, and less than 2**31"),
    "min_tokens": _integer(lambda v: 0 <= v < 2**31, "at least 0 and less than 2**31"),
    "seed": _integer(lambda v: -(2**63) <= v < 2**63, "a 64-bit integer"),
    "max_tokens": _integer(lambda v: 1 <= v < 2**31, "at least 1"),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "ignore_eos": _BOOLEAN,
    "include_stop_str_in_output": _BOOLEAN,
    "detokenize": _BOOLEAN,
    "skip_special_tokens": _BOOLEAN,
    "spaces_between_special_tokens": _BOOLEAN,
}
_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs"})
_SCALARS = tuple((f.name, f.default) for f in msgspec.structs.fields(SamplingParams) if f.name in _RULES)
_GET_SCALARS = attrgetter(*(name for name, _ in _SCALARS))
_GET_CONTAINERS = attrgetter("stop", "stop_token_ids", "bad_words", "logit_bias")
_NO_CONTAINERS: tuple[Any, ...] = ([], [], [], {})


def _complete_containers(p: SamplingParams) -> None:
    """As vLLM, take one string, and None for "none", where a list is meant."""
    for name in ("stop", "stop_token_ids", "bad_words", "logit_bias"):
        value = getattr(p, name)
        if value is None:
            msgspec.structs.force_setattr(p, name, {} if name == "logit_bias" else [])
        elif isinstance(value, str):
            msgspec.structs.force_setattr(p, name, [value])


def _validate(p: SamplingParams) -> None:
    """Every frontend and the engine do this for each request: fields left at their defaults cost a comparison."""
    for (name, default), value in zip(_SCALARS, _GET_SCALARS(p), strict=True):
        if value is default or (value is None and name in _OPTIONAL):
            continue
        rule = _RULES[name]
        _require(rule.is_type(value), name, rule.type_text, value)
        _require(rule.holds(value), name, rule.text, value)
    if p.min_tokens and p.max_tokens is not None:
        _require(
            p.min_tokens <= p.max_tokens, "min_tokens", f"at most max_tokens ({p.max_tokens})", p.min_tokens
        )
    _require(p.detokenize or not p.stop, "detokenize", "true when 'stop' strings are given", p.detokenize)
    if p.allowed_token_ids is not None or _GET_CONTAINERS(p) != _NO_CONTAINERS:
        _validate_lists(p)


def _validate_lists(p: SamplingParams) -> None:
    _check_strings("stop", p.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
    _check_strings("bad_words", p.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
    _check_token_ids("stop_token_ids", p.stop_token_ids, MAX_STOP_TOKEN_IDS)
    if p.allowed_token_ids is not None:
        _require(len(p.allowed_token_ids) > 0, "allowed_token_ids", "not empty", p.allowed_token_ids)
        _check_token_ids("allowed_token_ids", p.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
    _require(isinstance(p.logit_bias, dict), "logit_bias", "an object of token id to bias", p.logit_bias)
    _require(
        len(p.logit_bias) <= MAX_LOGIT_BIAS,
        "logit_bias",
        f"at most {MAX_LOGIT_BIAS} entries",
        len(p.logit_bias),
    )
    _check_token_ids("logit_bias", list(p.logit_bias), MAX_LOGIT_BIAS)
    for bias in p.logit_bias.values():
        ok = _is_number(bias) and -100.0 <= bias <= 100.0
        _require(ok, "logit_bias", "an object whose values are from -100 to 100", bias)


def _check_strings(name: str, values: Sequence[str], max_items: int, max_chars: int) -> None:
    _require(isinstance(values, list | tuple), name, "a string or a list of strings", values)
    _require(len(values) <= max_items, name, f"at most {max_items} strings", len(values))
    for value in values:
        ok = isinstance(value, str) and 0 < len(value) <= max_chars
        _require(ok, name, f"non-empty strings of at most {max_chars} characters", repr(value))
        _require(_is_unicode(value), name, "valid Unicode", repr(value))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_token_ids(name: str, values: Sequence[int], max_items: int) -> None:
    _require(isinstance(values, list | tuple), name, "a list of token ids", values)
    _require(len(values) <= max_items, name, f"at most {max_items} token ids", len(values))
    for value in values:
        _require(_is_int(value) and 0 <= value < 2**31, name, "token ids (non-negative integers)", value)
