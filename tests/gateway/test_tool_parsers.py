"""Every format of tool calls: what is a call, what is content, and when it is told."""

import json
from itertools import product
from typing import Any

import pytest
from charonia_client.gateway.parsers import (
    TOOL_PARSERS,
    OutputParser,
    make_parser,
    needs_special_tokens,
    parse_required_tool_calls,
)
from gateway.parsing import TOOLS, Total, tool, total

WEATHER = '{"city": "Paris", "days": 2}'


def parser(name: str, tools: Any = TOOLS) -> OutputParser:
    return make_parser(tool_parser=name, reasoning_parser=None, tools=tools)


def parsed(name: str, text: str) -> Total:
    whole = total(parser(name), [text])
    assert total(parser(name), text) == whole, "cut into characters"
    return whole


def call(name: str = "get_weather", arguments: str = WEATHER, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def one_call(name: str = "get_weather", arguments: str = WEATHER, content: str = "") -> Total:
    return Total(content, "", [name], [arguments])


HERMES = "<tool_call>\n{}\n</tool_call>"


class TestHermes:
    def test_one_call(self) -> None:
        assert parsed("hermes", HERMES.format(call())) == one_call()

    def test_content_calls_content(self) -> None:
        text = f"Let me see. {HERMES.format(call())}\n{HERMES.format(call('add', '{}'))}\n Done."
        assert parsed("hermes", text) == Total(
            "Let me see. \n Done.", "", ["get_weather", "add"], [WEATHER, "{}"]
        )

    def test_white_space_around_calls_is_layout(self) -> None:
        assert parsed("hermes", f"\n\n{HERMES.format(call())}\n  ") == one_call()
        assert parsed("hermes", f"\n\n{HERMES.format(call())} Done.") == one_call(content=" Done.")

    @pytest.mark.parametrize("closing", ["", "</tool_", "\n</tool_call>"])
    def test_a_closing_tag_may_be_missing(self, closing: str) -> None:
        assert parsed("hermes", f"<tool_call>{call()}{closing}") == one_call()

    def test_arguments_may_come_before_the_name(self) -> None:
        text = '<tool_call>{"arguments": {"a": [1, {"b": "}"}]}, "id": 7, "name": "add"}</tool_call>'
        assert parsed("hermes", text) == one_call("add", '{"a": [1, {"b": "}"}]}')

    @pytest.mark.parametrize(
        ("written", "told"),
        [(json.dumps(WEATHER), WEATHER), ("null", "{}"), ('{"city": "a\nb"}', '{"city": "a\\nb"}')],
    )
    def test_odd_arguments(self, written: str, told: str) -> None:
        assert parsed("hermes", HERMES.format(call(arguments=written))) == one_call(arguments=told)

    def test_a_name_alone_is_a_call(self) -> None:
        assert parsed("hermes", '<tool_call>{"name": "now"}</tool_call>') == one_call("now", "{}")

    @pytest.mark.parametrize(
        "body",
        [
            "not json",
            '{"name": 3, "arguments": {}}',
            '{"name": "", "arguments": {}}',
            '{"name": "a\\ud800", "arguments": {}}',
            '{"name": "add", "arguments": 5}',
            '{"name": "add", "arguments": "five"}',
            '{"name": "add", "arguments": "{\\"a\\": \\"\\\\ud800"}',
            '{"name": "add", "name": "add", "arguments": {}}',
            '{"arguments": {"a": 1}}',
            '{"name": "add", "arg',
            "{}",
            "",
        ],
    )
    def test_what_is_no_call_is_content(self, body: str) -> None:
        text = f"Look: <tool_call>{body}</tool_call>!"
        assert parsed("hermes", text) == Total(content=text)

    def test_a_call_after_a_malformed_one(self) -> None:
        text = f'<tool_call>{{"name": <tool_call>{call()}</tool_call>'
        assert parsed("hermes", text) == one_call(content='<tool_call>{"name": ')

    def test_malformed_within_the_arguments(self) -> None:
        text = '<tool_call>{"name": "add", "arguments": {"a": 1, oops}}</tool_call>'
        assert parsed("hermes", text) == one_call("add", '{"a": 1, ', "oops}}</tool_call>")

    @pytest.mark.parametrize(
        ("legal", "rest"),
        [
            ('"\\u00e', '"}'),
            ('"\\', 'x"}'),
            ("1" * 512, "1}"),
            ("01", "}"),
            ("1.", "}"),
            ("[1", " 2]}"),
            ("[1,", "]}"),
            ('{"b"', " 1}}"),
            ("nul", "}"),
            ("", "'x'}"),
        ],
    )
    def test_where_arguments_become_malformed(self, legal: str, rest: str) -> None:
        text = f'<tool_call>{{"name": "add", "arguments": {{"a":{legal}{rest}'
        result = parsed("hermes", text)
        assert result.names == ["add"]
        assert (result.arguments[0].rstrip(), result.content.lstrip()) == (f'{{"a":{legal}', rest.lstrip())

    @pytest.mark.parametrize("closing", ["</tool_call>", "\n</tool_call>\n", "</tool"])
    def test_a_closing_brace_may_be_missing(self, closing: str) -> None:
        assert parsed("hermes", f"<tool_call>{call()[:-1]}{closing}") == one_call()

    @pytest.mark.parametrize("tail", ["}", "}\n}", ",}", "]"])
    def test_brackets_between_a_call_and_its_closing_tag_go_with_it(self, tail: str) -> None:
        for closing in ("</tool_call>", "</tool"):
            assert parsed("hermes", f"<tool_call>{call()}{tail}\n{closing}") == one_call()
        text = f"<tool_call>{call()}{tail} is no tail"
        assert parsed("hermes", text) == one_call(content=f"{tail} is no tail")

    def test_arguments_that_are_cut_short(self) -> None:
        text = '<tool_call>{"name": "add", "arguments": {"a": "12'
        assert parsed("hermes", text) == one_call("add", '{"a": "12')

    def test_arguments_are_told_as_they_come(self) -> None:
        stream = parser("hermes")
        assert stream.push('<tool_call>{"name": "add"').tool_calls == ()
        (first,) = stream.push(', "arguments": {"a').tool_calls
        assert (first.index, first.name, first.arguments) == (0, "add", '{"a')
        (second,) = stream.push('": 1').tool_calls
        assert (second.id, second.name, second.arguments) == (None, None, '": 1')

    def test_content_is_held_back_only_while_it_may_be_a_marker(self) -> None:
        stream = parser("hermes")
        assert stream.push("a <tool").content == "a "
        assert stream.push("_c").content == ""
        assert stream.push("at> <").content == "<tool_cat> "
        assert stream.finish().content == "<"


class TestLlama3Json:
    def test_plain_tagged_and_separated(self) -> None:
        one = call(key="parameters")
        for text in (one, f" \n{one}", f"<|python_tag|>{one}"):
            assert parsed("llama3_json", text) == one_call()
        two = Total("", "", ["get_weather", "add"], [WEATHER, "{}"])
        for separator in ("; ", ";", "\n"):
            assert parsed("llama3_json", f"{one}{separator}{call('add', '{}', 'parameters')}") == two

    def test_content_before_a_tag(self) -> None:
        assert parsed("llama3_json", f"Hm.<|python_tag|>{call()}") == one_call(content="Hm.")

    @pytest.mark.parametrize(
        "text",
        [
            '{"name": "Ada", "parameters": {"born": 1815}}',
            '{"name": "add"}',
            '{"city": "Paris"}',
            f"The call is {call()}",
            "<|python_tag|>print(1)",
            '{"name": "ad',
        ],
    )
    def test_an_answer_that_is_no_call(self, text: str) -> None:
        assert parsed("llama3_json", text) == Total(content=text)

    def test_text_after_a_call(self) -> None:
        assert parsed("llama3_json", f"{call()}; {{or so}}") == one_call(content="; {or so}")


class TestMistral:
    @pytest.mark.parametrize("space", ["", " "])
    def test_array(self, space: str) -> None:
        text = f"Yes.[TOOL_CALLS]{space}[{call()},{space}{call('add', '{}')}]"
        assert parsed("mistral", text) == Total("Yes.", "", ["get_weather", "add"], [WEATHER, "{}"])

    @pytest.mark.parametrize("between", ["", "[ARGS]", "[CALL_ID]Ab3Ab3Ab3[ARGS]", " "])
    def test_name_and_arguments(self, between: str) -> None:
        text = f"[TOOL_CALLS]get_weather{between}{WEATHER}[TOOL_CALLS]add{between}{{}}"
        assert parsed("mistral", text) == Total("", "", ["get_weather", "add"], [WEATHER, "{}"])

    @pytest.mark.parametrize(
        "text",
        [
            "[TOOL_CALLS]",
            "[TOOL_CALLS] []",
            "[TOOL_CALLS]add",
            "[TOOL_CALLS]add(1, 2)",
            "[TOOL_CALLS]add[ARGX]{}",
            "[TOOL_CALLS]{}",
            f"[TOOL_CALLS]{'x' * 300}{{}}",
            "[TOOL_CALLS] [1]",
            "[TOOL_CAL",
        ],
    )
    def test_what_is_no_call_is_content(self, text: str) -> None:
        assert parsed("mistral", text) == Total(content=text)

    def test_identities_fit_mistrals_templates(self) -> None:
        (told,) = parser("mistral").push("[TOOL_CALLS]add{").tool_calls
        assert told.id is not None
        assert len(told.id) == 9
        assert told.id.isalnum()


class TestQwen3Coder:
    TEXT = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n12 <b>\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>"
    )

    def test_values_are_typed_by_the_schema(self) -> None:
        result = parsed("qwen3_coder", f"So: {self.TEXT}\n{self.TEXT}")
        assert result.content == "So: "
        assert result.names == ["get_weather"] * 2
        assert [json.loads(a) for a in result.arguments] == [{"city": "12 <b>", "days": 2, "exact": True}] * 2

    def test_a_value_that_does_not_fit_its_type_is_a_string(self) -> None:
        text = "<function=add><parameter=a>much</parameter><parameter=b>1.5</parameter>"
        text += "<parameter=note>null</parameter></function>"
        assert parsed("qwen3_coder", text) == one_call("add", '{"a": "much", "b": 1.5, "note": null}')

    @pytest.mark.parametrize(
        ("schema", "text", "value"),
        [
            ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "90210", "90210"),
            ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "true", "true"),
            ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '"quoted"', '"quoted"'),
            ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
            ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
            ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "90210", 90210),
            ({"oneOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
            ({"anyOf": [{"$ref": "#/$defs/A"}, {"type": "string"}]}, '{"a": 1}', {"a": 1}),
            ({"type": ["string", "null"]}, "False", "False"),
            ({"type": ["string", "boolean"]}, "False", False),
            ({"type": ["integer", "null"]}, " 7\n", 7),
            ({"type": "string"}, "7", "7"),
            ({"type": 7}, "7", 7),
            ({"anyOf": [7]}, "x", "x"),
            ({"anyOf": 7}, "7", "7"),
            ({}, "7", "7"),
        ],
    )
    def test_values_of_one_of_several_types(self, schema: Any, text: str, value: Any) -> None:
        stream = parser("qwen3_coder", [tool("f", a=schema)])
        result = total(stream, [f"<function=f><parameter=a>{text}</parameter></function>"])
        assert json.loads(result.arguments[0]) == {"a": value}

    def test_no_parameters(self) -> None:
        assert parsed("qwen3_coder", "<function=now>\n</function>") == one_call("now", "{}")

    def test_missing_closing_tags(self) -> None:
        text = "<function=f><parameter=a>x\n<parameter=b>y</function>"
        assert parsed("qwen3_coder", text) == one_call("f", '{"a": "x", "b": "y"}')
        text = "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</tool_call>"
        assert parsed("qwen3_coder", text) == one_call("f", '{"a": "x"}')
        assert parsed("qwen3_coder", "<tool_call>\n<function=f>\n</tool_call>") == one_call("f", "{}")

    def test_cut_short(self) -> None:
        text = "<function=f><parameter=a>x</parameter><parameter=b>say </para"
        assert parsed("qwen3_coder", text) == one_call("f", '{"a": "x", "b": "say </para')

    def test_malformed_within_the_arguments(self) -> None:
        text = "<function=f><parameter=a>x</parameter> oops</function>"
        assert parsed("qwen3_coder", text) == one_call("f", '{"a": "x"}', " oops</function>")

    @pytest.mark.parametrize(
        "text", ["<tool_call>{}</tool_call>", "<function=>", "<function=a\n>", "<function=a"]
    )
    def test_what_is_no_call_is_content(self, text: str) -> None:
        assert parsed("qwen3_coder", text) == Total(content=text)


class TestRequired:
    def totals(self, text: str, name: str | None = None) -> Total:
        whole = total(parse_required_tool_calls(name=name), [text])
        assert total(parse_required_tool_calls(name=name), text) == whole
        return whole

    def test_required(self) -> None:
        text = f" [{call(key='parameters')}, {call('add', '{}', 'parameters')}]\n"
        assert self.totals(text) == Total("", "", ["get_weather", "add"], [WEATHER, "{}"])

    def test_named(self) -> None:
        assert self.totals(f"{WEATHER}\n", "get_weather") == one_call()

    def test_arguments_are_told_as_they_come(self) -> None:
        stream = parse_required_tool_calls(name="add")
        assert stream.push('{"a"').tool_calls[0].arguments == '{"a"'
        assert stream.push(": 1").tool_calls[0].arguments == ": 1"

    @pytest.mark.parametrize(("text", "name"), [*product(["", "no", "[1]", "[]", '"x"'], [None, "add"])])
    def test_other_text_is_content(self, text: str, name: str | None) -> None:
        assert self.totals(text, name) == Total(content=text)


def test_calls_past_the_cap_are_content() -> None:
    result = parsed("hermes", HERMES.format(call("add", "{}")) * 130)
    assert len(result.names) == 128
    assert result.content.count("<tool_call>") == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f"Hm.{HERMES.format(call())}\n{HERMES.format(call('add', '{}'))} Done."),
        ("mistral", f"Hm.[TOOL_CALLS][{call()}, {call('add', '{}')}] Done."),
    ],
)
def test_only_the_first_call_where_one_is_allowed(name: str, text: str) -> None:
    for pieces in (text, [text]):
        stream = make_parser(tool_parser=name, reasoning_parser=None, tools=TOOLS, parallel_tool_calls=False)
        assert total(stream, pieces) == one_call(content="Hm. Done.")


def test_calls_nested_past_the_cap_are_malformed() -> None:
    depth = 5000
    result = parsed("hermes", f'<tool_call>{{"name": "add", "arguments": {{"a": {"[" * depth}{"]" * depth}}}')
    assert result.names == ["add"]
    assert result.content.count("[") > depth - 200


def test_without_tools_calls_are_not_looked_for() -> None:
    text = HERMES.format(call())
    assert total(parser("hermes", tools=[]), text) == Total(content=text)
    assert total(make_parser(tool_parser=None, reasoning_parser=None, tools=TOOLS), text) == Total(
        content=text
    )


def test_unknown_names_are_refused_naming_the_known() -> None:
    with pytest.raises(ValueError, match=r"no tool parser 'x'; known are hermes.*mistral"):
        parser("x")
    with pytest.raises(ValueError, match=r"no reasoning parser 'x'; known are deepseek_r1, qwen3"):
        make_parser(tool_parser=None, reasoning_parser="x", tools=[])


def test_formats_whose_marks_are_special_tokens() -> None:
    assert needs_special_tokens("mistral", None)
    assert needs_special_tokens(None, "mistral")
    assert not needs_special_tokens("hermes", "qwen3")


@pytest.mark.parametrize(
    "tools", [[{}], [{"function": None}], [{"function": {"name": "f", "parameters": []}}]]
)
def test_odd_tools_do_no_harm(tools: Any) -> None:
    for name in TOOL_PARSERS:
        total(parser(name, tools), "<function=f><parameter=a>1</parameter></function>")
