"""What a request may ask about the form of its output, with the names that users of vLLM know."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from charonia.errors import InvalidRequestError

MAX_SCHEMA_CHARS = 1 << 17
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARS = 1 << 14
MAX_GRAMMAR_CHARS = 1 << 16
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 1024
MAX_CHOICES_CHARS = 1 << 16
MAX_WHITESPACE_PATTERN_CHARS = 256

KINDS = ("json", "regex", "choice", "grammar", "json_object")
NAME = "structured_outputs"

_OF_VLLMS_COMPILER = {"backend", "backend_was_auto", "disable_fallback", "_backend", "_backend_was_auto"}
"""Fields of vLLM's own class, which Triton's OpenAI frontend sends whole: which library compiles the form."""


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    r"""The form that the output must have: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`.

    json: a JSON schema, given as an object or as text, kept as text. regex: matched by the whole output, with the
    syntax of Rust's regex crate (no look-around, no back-references), where `\d` is an ASCII digit. choice: the output
    is one of these strings. grammar: Lark, or GBNF (EBNF as llama.cpp writes it). json_object: any JSON object.
    For JSON: disable_any_whitespace allows none between tokens; whitespace_pattern is a regex of what is allowed there;
    disable_additional_properties forbids properties that a schema does not name.
    Raises `InvalidRequestError` for what is malformed or too large; what cannot be compiled is found by the engine.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            found = f", got {' and '.join(given)}" if given else ""
            raise _invalid(f"must have exactly one of {', '.join(KINDS)}{found}")
        _check_kind(self, given[0])
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(f"{name!r} must be a boolean")
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern, MAX_WHITESPACE_PATTERN_CHARS)

    @classmethod
    def from_value(cls, value: object) -> "StructuredOutputsParams":
        """Build from an object or its JSON text; nulls and what is for vLLM's compilers are ignored.

        Raises `InvalidRequestError`.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = _decode(value, "it")
        if not isinstance(value, Mapping):
            raise _invalid("must be an object or its JSON text")
        fields = {
            str(key): item
            for key, item in value.items()
            if item is not None and key not in _OF_VLLMS_COMPILER
        }
        unknown = sorted(set(fields) - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise _invalid(f"has no key {unknown[0][:80]!r}; known keys: {known}")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if fields.get(name) in ("true", "false"):
                fields[name] = fields[name] == "true"
        return cls(**fields)


LEGACY_KEYS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}
"""Keys of older vLLM releases that stood beside the sampling parameters, and what they are called now."""

_STATING_KEYS = frozenset({NAME, "guided_decoding", *LEGACY_KEYS})


def gather_structured(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every older way to state the form of the output turned into `structured_outputs`.

    Raises `InvalidRequestError` if it is stated twice.
    """
    plain = {key: value for key, value in values.items() if value is not None}
    if _STATING_KEYS.isdisjoint(plain):
        return plain
    legacy = {new: plain.pop(old) for old, new in LEGACY_KEYS.items() if old in plain}
    if isinstance(legacy.get("choice"), str):
        legacy["choice"] = _decode(legacy["choice"], "'guided_choice'")
    stated = [plain.pop(key) for key in (NAME, "guided_decoding") if key in plain]
    stated += [legacy] if legacy else []
    if len(stated) > 1:
        raise _invalid("is stated twice, once under an older name")
    return {**plain, NAME: stated[0]} if stated else plain


def _invalid(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"sampling parameter {NAME!r} {problem}")


def _check_kind(params: StructuredOutputsParams, kind: str) -> None:
    value = getattr(params, kind)
    if kind == "json":
        msgspec.structs.force_setattr(params, "json", _schema_text(value))
    elif kind == "choice":
        _check_choice(value)
    elif kind == "json_object":
        if value is not True:
            raise _invalid("'json_object' must be a boolean")
    else:
        _check_text(kind, value, MAX_REGEX_CHARS if kind == "regex" else MAX_GRAMMAR_CHARS)


def _check_text(name: str, value: object, max_chars: int) -> None:
    if not isinstance(value, str) or not value:
        raise _invalid(f"{name!r} must be a non-empty string")
    if len(value) > max_chars:
        raise _invalid(f"{name!r} has {len(value)} characters; at most {max_chars} are taken")
    if "\0" in value or not _is_unicode(value):
        raise _invalid(f"{name!r} must be valid Unicode without NUL")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_choice(value: object) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise _invalid("'choice' must be a non-empty list of strings")
    if len(value) > MAX_CHOICES:
        raise _invalid(f"'choice' has {len(value)} strings; at most {MAX_CHOICES} are taken")
    for item in value:
        _check_text("choice", item, MAX_CHOICE_CHARS)
    total = sum(map(len, value))
    if total > MAX_CHOICES_CHARS:
        raise _invalid(f"'choice' has {total} characters; at most {MAX_CHOICES_CHARS} are taken")


def _schema_text(value: object) -> str:
    """The schema as text, whose numbers no encoding on its way has to hold."""
    if isinstance(value, str):
        if len(value) > MAX_SCHEMA_CHARS:
            raise _invalid(f"'json' has {len(value)} characters; at most {MAX_SCHEMA_CHARS} are taken")
        value = _decode(value, "'json'")
    if not isinstance(value, Mapping):
        raise _invalid("'json' must be a JSON schema: an object, or its text")
    if _deeper_than(value, MAX_SCHEMA_DEPTH):
        raise _invalid(f"'json' is nested too deeply, at most {MAX_SCHEMA_DEPTH} levels are taken")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise _invalid("'json' must be a JSON schema: it holds what JSON does not") from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise _invalid(f"'json' has {len(text)} characters; at most {MAX_SCHEMA_CHARS} are taken")
    return text


def _decode(text: str, what: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        raise _invalid(f"is malformed: {what} is not valid JSON") from None


def _deeper_than(value: object, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            child
            for node in layer
            for child in (node.values() if isinstance(node, Mapping) else node)  # type: ignore[attr-defined]
            if isinstance(child, Mapping | list | tuple)
        ]
        if not layer:
            return False
    return True
