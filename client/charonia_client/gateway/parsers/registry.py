"""The formats by name, and how a parser is put together."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from charonia_client.gateway.parsers.deltas import MAX_TOOL_CALLS, DeltaBuilder, random_call_id, short_call_id
from charonia_client.gateway.parsers.hermes import HermesMachine
from charonia_client.gateway.parsers.llama3_json import Llama3JsonMachine
from charonia_client.gateway.parsers.machine import ToolMachine
from charonia_client.gateway.parsers.mistral import MistralMachine
from charonia_client.gateway.parsers.output_parser import OutputParser
from charonia_client.gateway.parsers.qwen3_coder import Qwen3CoderMachine
from charonia_client.gateway.parsers.reasoning import ReasoningFormat, ReasoningSplitter
from charonia_client.gateway.parsers.required import NamedMachine, RequiredMachine

Tools = Sequence[Mapping[str, Any]]
_MachineMaker = Callable[[DeltaBuilder, Tools], ToolMachine]


def _parameters_by_function(tools: Tools) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            continue
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        found[function["name"]] = properties if isinstance(properties, Mapping) else {}
    return found


def _hermes(builder: DeltaBuilder, tools: Tools) -> ToolMachine:
    return HermesMachine(builder)


def _llama3_json(builder: DeltaBuilder, tools: Tools) -> ToolMachine:
    return Llama3JsonMachine(builder, frozenset(_parameters_by_function(tools)))


def _mistral(builder: DeltaBuilder, tools: Tools) -> ToolMachine:
    return MistralMachine(builder)


def _qwen3_coder(builder: DeltaBuilder, tools: Tools) -> ToolMachine:
    return Qwen3CoderMachine(builder, _parameters_by_function(tools))


TOOL_PARSERS: Mapping[str, _MachineMaker] = MappingProxyType(
    {
        "hermes": _hermes,
        "qwen": _hermes,
        "llama3_json": _llama3_json,
        "llama4_json": _llama3_json,
        "mistral": _mistral,
        "qwen3_coder": _qwen3_coder,
        "qwen3_xml": _qwen3_coder,
    }
)
"""Formats of tool calls by the names that vLLM gives them."""

REASONING_PARSERS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        "deepseek_r1": ReasoningFormat("<think>", "</think>", always=True),
        "qwen3": ReasoningFormat("<think>", "</think>"),
        "glm45": ReasoningFormat("<think>", "</think>"),
        "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    }
)
"""Formats of reasoning by the names that vLLM gives them."""

SPECIAL_TOKEN_TOOL_PARSERS = frozenset({"mistral", "llama3_json", "llama4_json"})
SPECIAL_TOKEN_REASONING_PARSERS = frozenset({"mistral"})
"""Formats whose marks are special tokens: the text they parse must not have those skipped."""


def needs_special_tokens(tool_parser: str | None, reasoning_parser: str | None) -> bool:
    """Say whether the text has to be generated with ``skip_special_tokens`` false."""
    return tool_parser in SPECIAL_TOKEN_TOOL_PARSERS or reasoning_parser in SPECIAL_TOKEN_REASONING_PARSERS


def _splitter(name: str | None, *, opened: bool) -> ReasoningSplitter | None:
    if name is None:
        return None
    marks = REASONING_PARSERS.get(name)
    if marks is None:
        raise ValueError(f"no reasoning parser {name!r}; known are {', '.join(REASONING_PARSERS)}")
    return ReasoningSplitter(marks, opened=opened)


def _builder(tool_parser: str | None, told_calls: int = MAX_TOOL_CALLS) -> DeltaBuilder:
    call_id = short_call_id if tool_parser == "mistral" else random_call_id
    return DeltaBuilder(call_id, told_calls=told_calls)


def make_parser(
    *,
    tool_parser: str | None,
    reasoning_parser: str | None,
    tools: Tools,
    parallel_tool_calls: bool = True,
    prompt_opens_reasoning: bool = False,
) -> OutputParser:
    """Return a parser for one sequence.

    Args:
        tool_parser: a name in `TOOL_PARSERS`; None leaves tool calls in the content.
        reasoning_parser: a name in `REASONING_PARSERS`; None leaves reasoning in the content.
        tools: the tools of the request, in OpenAI's form; without any, calls are not looked for.
        parallel_tool_calls: whether to tell more than the first call.
        prompt_opens_reasoning: whether the prompt ends within reasoning.

    Raises:
        ValueError: a name is unknown.
    """
    if tool_parser is not None and tool_parser not in TOOL_PARSERS:
        raise ValueError(f"no tool parser {tool_parser!r}; known are {', '.join(TOOL_PARSERS)}")
    builder = _builder(tool_parser, MAX_TOOL_CALLS if parallel_tool_calls else 1)
    machine = TOOL_PARSERS[tool_parser](builder, tools) if tool_parser is not None and tools else None
    return OutputParser(builder, machine, _splitter(reasoning_parser, opened=prompt_opens_reasoning))


def parse_required_tool_calls(*, name: str | None = None, tool_parser: str | None = None) -> OutputParser:
    """Return a parser for one sequence that a grammar holds to tool calls, from its first token on.

    Args:
        name: the function that the request names: the text is its arguments. None: the text is a JSON array of
            ``{"name": ..., "parameters": {...}}``.
        tool_parser: the model's format, which decides on what identities look like.
    """
    builder = _builder(tool_parser)
    return OutputParser(
        builder, RequiredMachine(builder) if name is None else NamedMachine(builder, name), None
    )
