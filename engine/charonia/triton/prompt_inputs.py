"""The prompt of a request: a text, token ids, or a chat with its tools."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from charonia.errors import InvalidRequestError, UnsupportedError
from charonia.serving.request import ChatInput
from charonia.triton.contract import MAX_JSON_BYTES, MAX_PROMPT_BYTES
from charonia.triton.json_values import decode_json
from charonia.triton.pb import AnyArray

_CHAT_KEYS = {"messages", "tools", "tool_choice", "chat_template_kwargs", "add_generation_prompt",
              "continue_final_message"}  # fmt: skip


def read_prompt(inputs: Mapping[str, AnyArray]) -> str | list[int] | ChatInput:
    """The one prompt; an empty `text_input` beside another form of prompt is a placeholder.

    Raises `InvalidRequestError` or `UnsupportedError`.
    """
    given = [name for name in ("text_input", "input_ids", "messages") if name in inputs]
    if not given:
        raise InvalidRequestError("one of the inputs 'text_input', 'input_ids' and 'messages' is required")
    text = bytes_input(inputs, "text_input", MAX_PROMPT_BYTES) if "text_input" in inputs else b""
    if len(given) > 1 and not text and "text_input" in given:
        given.remove("text_input")
    if len(given) > 1:
        raise InvalidRequestError(
            f"inputs {given[0]!r} and {given[1]!r} exclude each other: a request has one prompt"
        )
    if given == ["input_ids"]:
        return _token_ids(inputs["input_ids"])
    if given == ["messages"]:
        return _chat(bytes_input(inputs, "messages", MAX_JSON_BYTES))
    return _decode(text, "text_input")


def _token_ids(array: AnyArray) -> list[int]:
    if array.ndim != 1 or array.dtype != np.int32:
        raise InvalidRequestError(
            f"input 'input_ids' must be INT32 of one dimension, got {array.dtype} of shape {list(array.shape)}"
        )
    ids: list[int] = array.tolist()
    return ids


def _chat(text: bytes) -> ChatInput:
    """A conversation: a JSON list of messages, or an object that holds it together with tools and template settings."""
    body = decode_json(text, "input 'messages'")
    fields: dict[str, Any] = {"messages": body} if isinstance(body, list) else body
    if not isinstance(fields, dict):
        raise InvalidRequestError(
            "input 'messages' must be a JSON list of messages, or an object that holds one"
        )
    unknown = sorted(set(fields) - _CHAT_KEYS)
    if unknown:
        raise InvalidRequestError(
            f"input 'messages': unknown key {unknown[0]!r}; known keys: {', '.join(sorted(_CHAT_KEYS))}"
        )
    messages, tools = fields.get("messages"), fields.get("tools")
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise InvalidRequestError(
            "input 'messages': 'messages' must be a non-empty list of objects that have a 'role'"
        )
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InvalidRequestError("input 'messages': 'tools' must be a list of objects")
    choice = fields.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise UnsupportedError(
            "input 'messages': only the values 'auto' and 'none' of 'tool_choice' are supported"
        )
    kwargs = fields.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise InvalidRequestError("input 'messages': 'chat_template_kwargs' must be an object")
    return ChatInput(
        messages=messages,
        tools=None if choice == "none" else tools,
        add_generation_prompt=_chat_flag(fields, "add_generation_prompt", default=True),
        continue_final_message=_chat_flag(fields, "continue_final_message", default=False),
        chat_template_kwargs=kwargs or {},
    )


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _chat_flag(fields: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"input 'messages': {key!r} must be a boolean")
    return default if value is None else value


def bytes_input(inputs: Mapping[str, AnyArray], name: str, limit: int) -> bytes:
    """The one string of an input. Raises `InvalidRequestError` where it is none, or longer than `limit` bytes."""
    array = inputs[name]
    if array.size != 1 or array.dtype != np.object_:
        raise InvalidRequestError(
            f"input {name!r} must be one string, got {array.dtype} of shape {list(array.shape)}"
        )
    value = array.item()
    data = value if isinstance(value, bytes) else str(value).encode()
    if len(data) > limit:
        raise InvalidRequestError(f"input {name!r} has {len(data)} bytes; at most {limit} are taken")
    return data


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input {name!r} is not valid UTF-8 at byte {error.start}") from None
