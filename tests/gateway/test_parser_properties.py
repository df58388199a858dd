"""Whatever the text and however it is cut: the same totals, nothing lost, in linear time."""

import contextlib
import json
import time

import pytest
from charonia_client.gateway.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputParser,
    make_parser,
    parse_required_tool_calls,
)
from charonia_client.gateway.parsers.json_scanner import JsonValueScanner, Status
from gateway.parsing import TOOLS, Total, cut, tool, total
from hypothesis import given, settings
from hypothesis import strategies as st

WRITTEN = (
    r"<tool_call> </tool_call> <tool_ [TOOL_CALLS] [ARGS] [CALL_ID] [ARG <|python_tag|> <|py <think> </think> </th "
    r"[THINK] [/THINK] <function=add> <function= </function> <parameter=a> <parameter= </parameter> > add < - true "
    r'{"name": "add", "name" "arguments": "parameters": "add" {"a":1} {"a": {} { } [ ] , ; : " \ \u00e9 \ud800 12 '
    r"null 1.5e3 x hello get_weather"
)
FRAGMENTS = WRITTEN.split()
BEGINNINGS = [
    '<tool_call>{"name": "add", "arguments": {"a": ',
    '<tool_call>\n{"arguments": {"a": 1}, "name": ',
    '{"name": "add", "parameters": {"a": [',
    '<|python_tag|>{"name": "now", "parameters": {',
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": "',
    "[TOOL_CALLS]add[ARGS]{",
    "<tool_call>\n<function=get_weather>\n<parameter=days>\n",
    '[{"name": "add", "parameters": {',
]

any_texts = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from([" ", "\n", "\n\n"]), st.text(max_size=5)),
    max_size=24,
).map("".join)
texts = st.one_of(
    any_texts,
    st.tuples(st.just("") | any_texts, st.sampled_from(BEGINNINGS), any_texts).map("".join),
)
places = st.lists(st.integers(0, 2000), max_size=40)
names = st.one_of(st.none(), st.sampled_from(sorted(TOOL_PARSERS)))
reasoning_names = st.one_of(st.none(), st.sampled_from(sorted(REASONING_PARSERS)))


def make(
    tool_parser: str | None, reasoning_parser: str | None = None, *, opened: bool = False
) -> OutputParser:
    return make_parser(
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        tools=TOOLS,
        prompt_opens_reasoning=opened,
    )


@settings(max_examples=400, deadline=None)
@given(texts, places, names, reasoning_names, st.booleans())
def test_the_cut_does_not_matter(
    text: str, places: list[int], name: str | None, reasoning: str | None, opened: bool
) -> None:
    whole = total(make(name, reasoning, opened=opened), [text])
    assert total(make(name, reasoning, opened=opened), cut(text, places)) == whole
    assert total(make(name, reasoning, opened=opened), text) == whole


@settings(max_examples=150, deadline=None)
@given(texts, places, st.sampled_from([None, "add"]))
def test_the_cut_does_not_matter_for_required_calls(text: str, places: list[int], name: str | None) -> None:
    whole = total(parse_required_tool_calls(name=name), [text])
    assert total(parse_required_tool_calls(name=name), cut(text, places)) == whole
    assert total(parse_required_tool_calls(name=name), text) == whole


@settings(max_examples=150, deadline=None)
@given(texts, names)
def test_text_without_calls_comes_out_unchanged(text: str, name: str | None) -> None:
    result = total(make(name), [text])
    if not result.names:
        assert result.content == text


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=3)


@settings(max_examples=150, deadline=None)
@given(ARGUMENTS, st.booleans(), st.sampled_from([None, 1]), places)
def test_arguments_are_the_json_of_the_text(
    arguments: dict[str, object], ascii_only: bool, indent: int | None, places: list[int]
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    call = f'{{"name": "add", "arguments": {written}}}'
    expected = Total("", "", ["add"], [written])
    for name, text in (
        ("hermes", f"<tool_call>{call}</tool_call>"),
        ("llama3_json", call),
        ("mistral", f"[TOOL_CALLS][{call}]"),
        ("mistral", f"[TOOL_CALLS]add{written}"),
    ):
        assert total(make(name), cut(text, places)) == expected
    assert total(parse_required_tool_calls(), cut(f"[{call}]", places)) == expected
    assert total(parse_required_tool_calls(name="add"), cut(written, places)) == expected


JSON_PIECES = r'{ } [ ] , : " "a" "a": \ \u \u00e9 \x 0 - 1.5 -0.5e+3 01 1. e true nul null NaN'
written_json = VALUES.map(json.dumps) | VALUES.map(
    lambda value: json.dumps(value, indent=1, ensure_ascii=False)
)
json_like = st.one_of(
    st.lists(st.sampled_from([*JSON_PIECES.split(), " ", "\t", "\n"]) | st.text(max_size=2), max_size=12).map(
        "".join
    ),
    st.tuples(written_json, st.integers(0, 40), st.text(max_size=2)).map(
        lambda made: made[0][: made[1]] + made[2] + made[0][made[1] :]
    ),
    written_json,
)


def loads(text: str) -> object:
    """What the standard library makes of JSON; line breaks and the like may stand in strings."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, strict=False, parse_constant=refuse)


@settings(max_examples=600, deadline=None)
@given(json_like, places)
def test_the_scanner_takes_json_and_nothing_else(text: str, places: list[int]) -> None:
    ended = f"{text},"  # a number ends at what follows it
    whole, pieces = JsonValueScanner(), JsonValueScanner()
    end = whole.feed(ended, 0)
    taken = whole.take()
    told = ""
    for piece in cut(ended, places):
        pieces.feed(piece, 0)
        told += pieces.take()
    assert (pieces.status, told) == (whole.status, taken)
    if whole.status is Status.DONE:
        assert loads(taken) == loads(ended[:end])
    with contextlib.suppress(ValueError):
        value = loads(text)
        assert whole.status is Status.DONE and loads(taken) == value


SEGMENTS = st.lists(
    st.one_of(
        st.text("ab. \u00e9\u4e2d", min_size=1, max_size=6),
        st.tuples(st.sampled_from(["add", "get_weather"]), ARGUMENTS),
    ),
    max_size=6,
)
WRITERS = {
    "hermes": lambda name, arguments: (
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    ),
    "mistral": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}",
    "llama3_json": lambda name, arguments: f'<|python_tag|>{{"name": "{name}", "parameters": {arguments}}}',
}


@settings(max_examples=200, deadline=None)
@given(SEGMENTS, st.sampled_from(sorted(WRITERS)), st.booleans(), places)
def test_calls_between_texts_come_back(
    segments: list[str | tuple[str, dict[str, object]]], parser: str, ascii_only: bool, places: list[int]
) -> None:
    written, texts, names, arguments = "", "", [], []
    for segment in segments:
        if isinstance(segment, str):
            written += segment
            texts += segment
        else:
            names.append(segment[0])
            arguments.append(json.dumps(segment[1], ensure_ascii=ascii_only))
            written += WRITERS[parser](names[-1], arguments[-1])
    result = total(make(parser), cut(written, places))
    assert (result.names, result.arguments) == (names, arguments)
    # White space next to a call is layout.
    assert "".join(result.content.split()) == "".join(texts.split())


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), VALUES, max_size=3), places)
def test_typed_parameters_come_back(arguments: dict[str, object], places: list[int]) -> None:
    """A parameter between tags is read by its schema, whatever it holds but the tags themselves."""
    schema = {
        name: {"type": "string" if isinstance(value, str) else "object"} for name, value in arguments.items()
    }
    text = "<tool_call>\n<function=f>\n"
    for name, value in arguments.items():
        written = value if isinstance(value, str) else json.dumps(value)
        text += f"<parameter={name}>\n{written}\n</parameter>\n"
    parser = make_parser(tool_parser="qwen3_coder", reasoning_parser=None, tools=[tool("f", **schema)])
    result = total(parser, cut(f"{text}</function>\n</tool_call>", places))
    assert (result.content, result.names) == ("", ["f"])
    assert json.loads(result.arguments[0]) == arguments


N = 200_000
BOMBS = {
    "spaces": " ",
    "brackets": "<",
    "openings": "<tool_call>",
    "half openings": "<tool_cal",
    "spaces after a call": ('<tool_call>{"name": "add", "arguments": {}}', " "),
    "a header without end": ('<tool_call>{"x": "', "a"),
    "a name without end": ('<tool_call>{"name": "', "a"),
    "nesting": ('<tool_call>{"name": "add", "arguments": ', '{"a":'),
    "a number without end": ('<tool_call>{"name": "add", "arguments": {"a": ', "1"),
    "escapes": ('<tool_call>{"name": "add", "arguments": {"a": "', "\\u0041"),
    "separators": ('{"name": "add", "parameters": {}}', ";"),
    "calls": ("[TOOL_CALLS][", '{"name": "add", "arguments": {}},'),
    "a bare name without end": ("[TOOL_CALLS]", "a"),
    "parameters": ("<function=add>", "<parameter=a>1</parameter>"),
    "half closings": ("<function=add><parameter=a>", "</paramete"),
    "line breaks in reasoning": ("<think>", "\n"),
    "half closings of reasoning": ("<think>", "</thin"),
}
MACHINES = sorted({*TOOL_PARSERS} - {"qwen", "llama4_json", "qwen3_xml"})


def bomb(kind: str, length: int) -> str:
    start, repeated = ("", BOMBS[kind]) if isinstance(BOMBS[kind], str) else BOMBS[kind]
    return start + repeated * (length // len(repeated))


@pytest.mark.parametrize("kind", BOMBS)
def test_one_long_piece_takes_linear_time(kind: str) -> None:
    """At this length a parser that reads its text again and again takes minutes."""
    text = bomb(kind, N)
    for name in MACHINES:
        before = time.process_time()
        total(make(name, "qwen3"), [text])
        assert time.process_time() - before < 5


@pytest.mark.parametrize("kind", BOMBS)
def test_what_is_read_again_at_the_next_piece_is_bounded(kind: str) -> None:
    for name in MACHINES:
        parser = make(name, "qwen3")
        machine, splitter = parser._machine, parser._splitter
        assert machine is not None
        assert splitter is not None
        for character in bomb(kind, 1_000):
            parser.push(character)
            assert len(machine.text) - machine.position < 16
            assert len(splitter._text) - splitter._position < 16
