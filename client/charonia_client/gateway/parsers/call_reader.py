"""Reads one tool call that is a JSON object with a name and arguments, and tells it while it arrives."""

import json
import re
from collections.abc import Callable, Container

from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.json_scanner import JsonValueScanner, Status, skip_space

MAX_NAME_LENGTH = 256
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


def legal_name(name: object) -> bool:
    """Say whether a value can be the name of a function."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def is_json_object(text: str) -> bool:
    """Say whether ``text`` is one JSON object, within the caps of the scanner, that UTF-8 can carry."""
    if _LONE_SURROGATE.search(text):
        return False
    scanner = JsonValueScanner()
    end = scanner.feed(text, 0)
    return scanner.status is Status.DONE and text.lstrip().startswith("{") and not text[end:].strip()


class CallReader:
    """Takes ``{"name": ..., "arguments": {...}}`` from the front of a text.

    The call starts in the builder once its name and the beginning of its arguments are known; until then the
    object may still turn out not to be a call, and ``raw()`` gives back its text. Other members are read and
    ignored. Arguments that are a string holding a JSON object count as that object.

    Args:
        builder: what is told.
        names: the only names a call may have; any, when None.
        arguments_optional: whether a name alone is a call, without arguments.
    """

    def __init__(
        self, builder: DeltaBuilder, *, names: Container[str] | None = None, arguments_optional: bool = False
    ) -> None:
        self.status = Status.OPEN
        self.started = False
        self._builder = builder
        self._names = names
        self._arguments_optional = arguments_optional
        self._state: Callable[[str, int], int] = self._open
        self._raw: list[str] = []
        self._scanner = JsonValueScanner()
        self._value: list[str] = []
        self._key = ""
        self._seen: set[str] = set()
        self._name: str | None = None
        self._early_arguments: list[str] = []

    def feed(self, text: str, start: int) -> int:
        """Read on from ``start``; return where the object ended, failed, or the text did."""
        position = start
        while position < len(text) and self.status is Status.OPEN:
            position = self._state(text, position)
        if not self.started:
            self._raw.append(text[start:position])
        return position

    def raw(self) -> str:
        """Return the text read so far, of a call that never started."""
        return "".join(self._raw)

    def _fail(self, position: int) -> int:
        self.status = Status.FAILED
        return position

    def _expect(self, text: str, position: int, character: str, state: Callable[[str, int], int]) -> int:
        position = skip_space(text, position)
        if position == len(text):
            return position
        if text[position] != character:
            return self._fail(position)
        self._state = state
        return position + 1

    def _open(self, text: str, position: int) -> int:
        return self._expect(text, position, "{", self._before_key)

    def _before_key(self, text: str, position: int) -> int:
        position = skip_space(text, position)
        if position < len(text):
            if text[position] != '"':
                return self._fail(position)
            self._begin_value(self._in_key)
        return position

    def _begin_value(self, state: Callable[[str, int], int]) -> None:
        self._scanner = JsonValueScanner()
        self._value.clear()
        self._state = state

    def _read_value(self, text: str, position: int) -> int:
        position = self._scanner.feed(text, position)
        if self._scanner.status is Status.FAILED:
            self.status = Status.FAILED
        return position

    def _in_key(self, text: str, position: int) -> int:
        position = self._read_value(text, position)
        self._value.append(self._scanner.take())
        if self._scanner.status is Status.DONE:
            self._key = json.loads("".join(self._value))
            role = "arguments" if self._key in _ARGUMENT_KEYS else self._key
            if role in ("name", "arguments"):
                if role in self._seen:
                    return self._fail(position)
                self._seen.add(role)
            self._state = self._colon
        return position

    def _colon(self, text: str, position: int) -> int:
        return self._expect(text, position, ":", self._before_value)

    def _before_value(self, text: str, position: int) -> int:
        position = skip_space(text, position)
        if position < len(text):
            is_object = self._key in _ARGUMENT_KEYS and text[position] == "{"
            self._begin_value(self._in_arguments if is_object else self._in_member)
            if is_object:
                self._start_if_named()
        return position

    def _in_arguments(self, text: str, position: int) -> int:
        position = self._read_value(text, position)
        self._tell_arguments(self._scanner.take())
        if self._scanner.status is Status.DONE:
            self._state = self._after_value
        return position

    def _in_member(self, text: str, position: int) -> int:
        position = self._read_value(text, position)
        piece = self._scanner.take()
        if self._key == "name" or self._key in _ARGUMENT_KEYS:
            self._value.append(piece)
        if self._scanner.status is not Status.DONE:
            return position
        self._state = self._after_value
        if self._key == "name":
            return position if self._take_name() else self._fail(position)
        if self._key in _ARGUMENT_KEYS:
            return position if self._take_odd_arguments() else self._fail(position)
        return position

    def _take_name(self) -> bool:
        text = "".join(self._value)
        name = json.loads(text) if text.startswith('"') else None
        if not legal_name(name) or (self._names is not None and name not in self._names):
            return False
        self._name = name
        if "arguments" in self._seen:
            self._start_if_named()
        return True

    def _take_odd_arguments(self) -> bool:
        text = "".join(self._value)
        if text == "null":
            arguments = "{}"
        elif text.startswith('"') and is_json_object(json.loads(text)):
            arguments = json.loads(text)
        else:
            return False
        self._start_if_named()
        self._tell_arguments(arguments)
        return True

    def _start_if_named(self) -> None:
        if self._name is None:
            return
        self.started = True
        self._raw.clear()
        self._builder.start_call(self._name)
        self._builder.arguments("".join(self._early_arguments))
        self._early_arguments.clear()

    def _tell_arguments(self, text: str) -> None:
        if self.started:
            self._builder.arguments(text)
        else:
            self._early_arguments.append(text)

    def _after_value(self, text: str, position: int) -> int:
        position = skip_space(text, position)
        if position == len(text):
            return position
        if text[position] == ",":
            self._state = self._before_key
            return position + 1
        if text[position] != "}":
            return self._fail(position)
        if not self.started and not self._start_without_arguments():
            return self._fail(position)
        self.status = Status.DONE
        return position + 1

    def _start_without_arguments(self) -> bool:
        if self._name is None or not self._arguments_optional:
            return False
        self._start_if_named()
        self._tell_arguments("{}")
        return True
