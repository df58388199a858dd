"""From what a request asks for to a grammar that llguidance compiles."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, grammar_from, regex_to_lark

from charonia.errors import InvalidRequestError
from charonia.structured_params import StructuredOutputsParams

DEFAULT_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
"""What may stand between JSON tokens unless the request says otherwise. Bounded, as models are known to write nothing
but line breaks once they may."""

ASCII_CLASSES = "d"
r"""Regex classes that are ASCII: whoever asks for \d in an output means the digits 0 to 9."""

MAX_ERROR_CHARS = 400


def parser_limits() -> LLParserLimits:
    """What one grammar may cost, in llguidance's own measures.

    The initial fuel is for compiling (about 50k a millisecond), the other for one mask (about 14k); states of the lexer
    take 1 to 2 kB each. Larger than by default are the items of a row, which many optional properties need.
    """
    return LLParserLimits(
        max_items_in_row=10_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


BYTES_PER_GRAMMAR = 100_000
BYTES_PER_CHAR = 128
"""Measured: 20 to 100 kB for small grammars, and 2 (choices) to 270 (a regex of letters) for each character more."""


def compiled_bytes(grammar: str) -> int:
    """About the memory that a grammar takes once it is compiled, which llguidance does not tell.

    Left out is what its lexer finds out while sequences follow it: mostly less, at most 100 MB (`parser_limits`).
    """
    return BYTES_PER_GRAMMAR + BYTES_PER_CHAR * len(grammar)


def llguidance_grammar(params: StructuredOutputsParams) -> str:
    """The grammar's text. Raises `InvalidRequestError`; the text may still turn out not to compile."""
    if params.regex is not None:
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(params.regex, ASCII_CLASSES)}/")
    if params.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, params.choice)))
    if params.grammar is not None:
        try:
            return grammar_from("grammar", params.grammar)
        except ValueError as error:
            raise uncompilable(str(error)) from None
    return _json_grammar(params)


def uncompilable(reason: str) -> InvalidRequestError:
    """The error for a grammar at fault. reason: llguidance's, of which clients see the beginning."""
    lines = [line.strip() for line in reason.replace("<non-verbose/>", "").splitlines()]
    shown = " ".join(line for line in lines if line)[:MAX_ERROR_CHARS]
    return InvalidRequestError(f"sampling parameter 'structured_outputs' cannot be compiled: {shown}")


def _json_grammar(params: StructuredOutputsParams) -> str:
    schema: Any = {"type": "object"} if params.json is None else params.json
    if isinstance(schema, str):
        schema = msgspec.json.decode(schema)
    if params.disable_additional_properties:
        schema = _closed(schema)
    stated: dict[str, Any] = {}
    if params.whitespace_pattern is not None:
        stated["whitespace_pattern"] = params.whitespace_pattern
    elif params.disable_any_whitespace:
        stated["whitespace_flexible"] = False
    defaults: Any = {} if params.disable_any_whitespace else {"whitespace_pattern": DEFAULT_WHITESPACE}
    overrides: Any = stated
    try:
        return LLMatcher.grammar_from_json_schema(
            msgspec.json.encode(schema).decode(), defaults=defaults, overrides=overrides
        )
    except ValueError as error:
        raise uncompilable(str(error)) from None


def _closed(schema: Any) -> Any:
    """The schema with objects that take no properties but those named, unless they say something about others."""
    if isinstance(schema, Mapping):
        closed = {key: _closed(value) for key, value in schema.items()}
        if "properties" in closed or "patternProperties" in closed:
            closed.setdefault("additionalProperties", False)
        return closed
    return [_closed(item) for item in schema] if isinstance(schema, list) else schema
