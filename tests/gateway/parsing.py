"""Pushes texts through parsers and adds up what comes out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from charonia_client.gateway.parsers import OutputParser


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}, exact={"type": "boolean"}),
    tool("add", a={"type": "number"}, b={"type": "number"}, note={"anyOf": [{"type": "null"}]}),
]


@dataclass
class Total:
    content: str = ""
    reasoning: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)


def total(parser: OutputParser, pieces: Iterable[str]) -> Total:
    """Add up the deltas, checking that each call begins once, with its identity."""
    result = Total()
    ids: set[str] = set()
    for delta in (*(parser.push(piece) for piece in pieces), parser.finish()):
        result.content += delta.content
        result.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.name is not None:
                assert call.index == len(result.names)
                assert call.id
                assert call.id not in ids
                ids.add(call.id)
                result.names.append(call.name)
                result.arguments.append("")
            else:
                assert call.id is None
                assert call.index == len(result.names) - 1
                assert call.arguments
            result.arguments[call.index] += call.arguments
    assert parser.saw_tool_calls == bool(result.names)
    return result


def cut(text: str, places: Sequence[int]) -> list[str]:
    """Cut ``text`` at the places, taken modulo its length."""
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
