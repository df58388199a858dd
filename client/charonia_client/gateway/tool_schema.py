"""The JSON schema that holds a model to tool calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from charonia_client.gateway.errors import ApiError
from charonia_client.gateway.protocol import ChatTool

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_DEFINITIONS = ("$defs", "definitions")


def named_tool_schema(tools: Sequence[ChatTool], name: str) -> Mapping[str, Any]:
    """The schema of one function's arguments. Raises `ApiError` where no tool has that name."""
    for tool in tools:
        if tool.function.name == name:
            return _parameters(tool)
    raise ApiError(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")


def required_tools_schema(tools: Sequence[ChatTool], *, parallel: bool) -> dict[str, Any]:
    """The schema of an array of calls, each ``{"name": ..., "parameters": {...}}``.

    parallel: whether there may be several. Raises `ApiError` where there are no tools.
    """
    if not tools:
        raise ApiError("tool_choice 'required' needs tools", param="tools")
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool, f"tool{i}.", definitions) for i, tool in enumerate(tools)]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
    }
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _call_schema(tool: ChatTool, prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of calls of one tool; what it defines goes to the root, where references can find it."""
    parameters = _parameters(tool)
    try:
        for keyword in _DEFINITIONS:
            defined = parameters.get(keyword)
            if isinstance(defined, Mapping):
                definitions.update(
                    {prefix + name: _rewritten(value, prefix) for name, value in defined.items()}
                )
        own = {key: value for key, value in parameters.items() if key not in _DEFINITIONS}
        arguments = _rewritten(own, prefix)
    except RecursionError:
        raise ApiError("the parameters of a tool are nested too deeply", param="tools") from None
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": arguments},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _parameters(tool: ChatTool) -> Mapping[str, Any]:
    return tool.function.parameters or _NO_PARAMETERS


def _rewritten(value: Any, prefix: str) -> Any:
    """A copy whose references point to the definitions at the root."""
    if isinstance(value, Mapping):
        return {key: _reference(key, item, prefix) for key, item in value.items()}
    if isinstance(value, list):
        return [_rewritten(item, prefix) for item in value]
    return value


def _reference(key: str, value: Any, prefix: str) -> Any:
    if key == "$ref" and isinstance(value, str):
        for keyword in _DEFINITIONS:
            start = f"#/{keyword}/"
            if value.startswith(start):
                return f"#/$defs/{prefix}{value.removeprefix(start)}"
        return value
    return _rewritten(value, prefix)
