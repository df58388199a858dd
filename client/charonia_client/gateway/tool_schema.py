"""The JSON schema that holds a model to tool calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from charonia_client.gateway.errors import ApiError
from charonia_client.gateway.protocol import ChatTool


def named_tool_schema(tools: Sequence[ChatTool], name: str) -> dict[str, Any]:
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
    calls = [_call_schema(tool, f"#/$defs/tool{i}") for i, tool in enumerate(tools)]
    try:
        definitions = {
            f"tool{i}": _moved(_parameters(tool), f"#/$defs/tool{i}") for i, tool in enumerate(tools)
        }
    except RecursionError:
        raise ApiError("the parameters of a tool are nested too deeply", param="tools") from None
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "$defs": definitions,
    }
    if not parallel:
        schema["maxItems"] = 1
    return schema


def _call_schema(tool: ChatTool, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": place}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _parameters(tool: ChatTool) -> dict[str, Any]:
    """Arguments are an object, whether the schema says so or not; without any schema, they are none.

    An ``$id`` would make of the schema a document of its own within the larger one, with other references.
    """
    given = tool.function.parameters or {"properties": {}}
    return {"type": "object", **{key: value for key, value in given.items() if key != "$id"}}


def _moved(value: Any, place: str) -> Any:
    """A copy to stand at `place` of a larger schema, with references into itself that say so."""
    if isinstance(value, list):
        return [_moved(item, place) for item in value]
    if not isinstance(value, Mapping):
        return value
    copy = {key: _moved(item, place) for key, item in value.items()}
    target = copy.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        copy["$ref"] = place + target[1:]
    return copy
