"""Where reasoning ends and the answer begins."""

import pytest
from charonia_client.gateway.parsers import make_parser
from gateway.parsing import TOOLS, Total, total


def parsed(name: str, text: str, *, opened: bool = False) -> Total:
    def parser():
        return make_parser(
            tool_parser="hermes", reasoning_parser=name, tools=TOOLS, prompt_opens_reasoning=opened
        )

    whole = total(parser(), [text])
    assert total(parser(), text) == whole, "cut into characters"
    return whole


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "content"),
    [
        ("qwen3", "<think>\nhm\n\nso\n</think>\n\nYes.\n", "hm\n\nso", "Yes.\n"),
        ("qwen3", "\n<think></think>Yes.", "", "Yes."),
        ("qwen3", "<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("qwen3", "\n\nYes. <think>no</think>", "", "\n\nYes. <think>no</think>"),
        ("qwen3", "<thin ice", "", "<thin ice"),
        ("qwen3", "<thin", "", "<thin"),
        ("qwen3", "\n\n", "", "\n\n"),
        ("qwen3", "<think>never </th", "never </th", ""),
        ("deepseek_r1", "hm</think>\nYes.", "hm", "Yes."),
        ("deepseek_r1", "<think>hm</think>Yes.", "hm", "Yes."),
        ("deepseek_r1", "never closed\n", "never closed", ""),
        ("deepseek_r1", "", "", ""),
        ("mistral", "[THINK]hm[/THINK]Yes.", "hm", "Yes."),
        ("mistral", "Yes.", "", "Yes."),
    ],
)
def test_formats(name: str, text: str, reasoning: str, content: str) -> None:
    assert parsed(name, text) == Total(content, reasoning)


def test_a_prompt_that_opens_reasoning() -> None:
    assert parsed("qwen3", "hm</think>\n\nYes.", opened=True) == Total("Yes.", "hm")


def test_calls_are_looked_for_after_the_reasoning_only() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    result = parsed("qwen3", f"<think>{call}</think>\n\n{call}")
    assert result == Total("", call, ["add"], ["{}"])


def test_reasoning_is_told_as_it_comes() -> None:
    parser = make_parser(tool_parser=None, reasoning_parser="qwen3", tools=[])
    assert parser.push("<think>one ").reasoning == "one "
    assert parser.push("two\n").reasoning == "two"
    assert parser.push("</thi").reasoning == ""
    assert parser.push("s").reasoning == "\n</this"
    delta = parser.push("</think>Yes")
    assert (delta.reasoning, delta.content) == ("", "Yes")
