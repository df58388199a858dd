"""Validation of chat messages: plain JSON of bounded size, with errors that name the field."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from charonia.errors import InvalidRequestError, UnsupportedError
from charonia.text.tokenizer import check_text

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_ROLE_CHARS = 64
MAX_DEPTH = 32


def check_messages(messages: object, *, keep_parts: bool, max_chars: int) -> list[dict[str, Any]]:
    """A checked copy of `messages`, made of plain JSON types only.

    keep_parts: leave content given as a list of text parts a list; otherwise the texts are joined by
    newlines. Raises `InvalidRequestError` that names the message and the field; `UnsupportedError` for parts
    that are no text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequestError(f"'messages' must be a list of messages, got {type(messages).__name__}")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(f"'messages' must have 1 to {MAX_MESSAGES} entries, got {len(messages)}")
    checked = [_check_message(message, f"messages[{i}]", keep_parts) for i, message in enumerate(messages)]
    plain: list[dict[str, Any]] = check_json(checked, "messages", max_chars=max_chars)
    return plain


def check_json(value: Any, name: str, *, max_chars: int = 1 << 20) -> Any:
    """A copy of `value` if it is plain JSON of at most `max_chars` characters and `MAX_DEPTH` levels.

    Raises `InvalidRequestError` that names `name`.
    """
    size = 0

    def copy(item: Any, path: str, depth: int) -> Any:
        nonlocal size
        size += 1 + (len(item) if isinstance(item, str) else 0)
        if size > max_chars:
            raise InvalidRequestError(f"{name} is larger than {max_chars} characters")
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{name} is nested more than {MAX_DEPTH} levels deep")
        if item is None or isinstance(item, bool | int | float):
            return item
        if isinstance(item, str):
            check_text(item, path)
            return str(item)
        if isinstance(item, Mapping):
            for key in item:
                check_text(key, f"a key of {path}")
            return {str(key): copy(entry, f"{path}.{key[:40]}", depth + 1) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [copy(entry, f"{path}[{i}]", depth + 1) for i, entry in enumerate(item)]
        raise InvalidRequestError(f"{path} must be plain JSON, got {type(item).__name__}")

    return copy(value, name, 0)


def _check_message(message: Any, path: str, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{path} must be an object, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= MAX_ROLE_CHARS:
        raise InvalidRequestError(f"{path}.role must be a string of 1 to {MAX_ROLE_CHARS} characters")
    checked = dict(message)
    if "content" in message or not message.get("tool_calls"):
        checked["content"] = _check_content(message, path, keep_parts)
    if message.get("tool_calls") is not None:
        checked["tool_calls"] = _check_tool_calls(message["tool_calls"], f"{path}.tool_calls")
    return checked


def _check_content(
    message: Mapping[str, Any], path: str, keep_parts: bool
) -> str | list[dict[str, str]] | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, list | tuple):
        kind = "missing" if content is None else type(content).__name__
        raise InvalidRequestError(f"{path}.content must be a string or a list of content parts, got {kind}")
    if len(content) > MAX_PARTS:
        raise InvalidRequestError(f"{path}.content must have at most {MAX_PARTS} parts, got {len(content)}")
    texts = [_check_part(part, f"{path}.content[{i}]") for i, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if keep_parts else "\n".join(texts)


def _check_part(part: Any, path: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequestError(f"{path} must be an object, got {type(part).__name__}")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{path}.type must be a string")
    if kind != "text":
        raise UnsupportedError(f"{path}: content of type {kind[:40]!r} is not supported, only 'text' is")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{path}.text must be a string, got {type(text).__name__}")
    return text


def _check_tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects, which is what templates expect; the OpenAI API sends them as JSON
    text.
    """
    if not isinstance(calls, list | tuple):
        raise InvalidRequestError(f"{path} must be a list, got {type(calls).__name__}")
    checked: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(f"{path}[{i}].function must be an object with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse_arguments(arguments, f"{path}[{i}].function.arguments")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _parse_arguments(text: str, path: str) -> Any:
    if not text.strip():
        return {}
    check_text(text, path)
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(f"{path} must be a JSON object") from None
