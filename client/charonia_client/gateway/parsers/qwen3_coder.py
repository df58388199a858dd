"""``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``: Qwen3-Coder."""

import json
import re
from collections.abc import Mapping
from typing import Any

from charonia_client.gateway.parsers.call_reader import MAX_NAME_LENGTH, legal_name
from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.json_scanner import JsonValueScanner, Status
from charonia_client.gateway.parsers.machine import ToolMachine
from charonia_client.gateway.parsers.markers import MarkerFinder

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_FINDER = MarkerFinder([_CALL, _FUNCTION])
_VALUE_ENDS = MarkerFinder([_PARAMETER_END, _PARAMETER, _FUNCTION_END])
_NAME = re.compile(r"[^<>\n]+")


_WORDS = {"True": "true", "False": "false", "None": "null"}
_TYPE_BY_START = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_STRING = frozenset({"string"})


def _is_json(text: str) -> bool:
    scanner = JsonValueScanner()
    end = scanner.feed(text + " ", 0)  # a number ends at what follows it
    return scanner.status is Status.DONE and not text[end:].strip()


def _named_types(schema: Any) -> frozenset[str] | None:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = [kind] if isinstance(kind, str) else kind
    if not isinstance(kinds, list) or not all(isinstance(name, str) for name in kinds):
        return None
    return frozenset("number" if name == "integer" else name for name in kinds)


def _types(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """The types that a schema allows, integers being numbers; None where it is not plain to see."""
    for keyword in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(keyword), list):
            found = [_named_types(member) for member in members]
            return None if None in found else frozenset().union(*(kinds or () for kinds in found))
    if "type" in schema or schema.keys() & {"allOf", "$ref"}:
        return _named_types(schema)
    return _STRING


def value_as_json(text: str, schema: Mapping[str, Any]) -> str:
    """Return the JSON of a value that was written without its type.

    Text that is JSON is taken as such, unless the schema allows a string and nothing of the JSON's type. A schema
    that says nothing means a string.
    """
    types = _types(schema)
    if types != _STRING:
        written = text.strip()
        written = _WORDS.get(written, written)
        kind = _TYPE_BY_START.get(written[:1], "number")
        is_plain = types is not None and "string" in types and kind not in types - _STRING
        if not is_plain and _is_json(written):
            return written
    return json.dumps(text, ensure_ascii=False)


class Qwen3CoderMachine(ToolMachine):
    """Calls in tags, anywhere in the text; a parameter is told when it is complete.

    Args:
        builder: what is told.
        parameters: by function, the JSON schemas of its parameters, which tell strings from other values.
    """

    def __init__(self, builder: DeltaBuilder, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(builder)
        self._all_parameters = parameters
        self._parameters: Mapping[str, Any] = {}
        self._name = ""
        self._separator = "{"
        self._value: list[str] = []
        self.state = self._in_content

    def _in_content(self) -> bool:
        if not self.take_content(_FINDER):
            return False
        if self.text.startswith(_CALL, self.position):
            self.hold(self.position + len(_CALL))
            self.state = self._before_function
        else:
            self._begin_function()
        return True

    def _before_function(self) -> bool:
        if not self.hold_space():
            return False
        found = self.is_next(_FUNCTION)
        if found is None:
            return False
        if found:
            self._begin_function()
        else:
            self._fail()
        return True

    def _begin_function(self) -> None:
        self.hold(self.position + len(_FUNCTION))
        self._name = ""
        self.state = self._in_function_name

    def _fail(self) -> bool:
        self.give_up()
        self.state = self._in_content
        return True

    def _take_name(self) -> bool | None:
        """Take a name and the ``>`` after it; False if it cannot be one, None when more text is needed."""
        run = _NAME.match(self.text, self.position)
        if run is not None:
            piece = run[0][: MAX_NAME_LENGTH - len(self._name)]
            self._name += piece
            self.hold(self.position + len(piece))
            if self.position < run.end():
                return False
        if self.position == len(self.text):
            return None
        if self.text[self.position] != ">" or not legal_name(self._name.strip()):
            return False
        self.hold(self.position + 1)
        self._name = self._name.strip()
        return True

    def _in_function_name(self) -> bool:
        taken = self._take_name()
        if taken is None:
            return False
        if not taken:
            return self._fail()
        if not self.builder.may_start:
            self.give_up()
            self.state = self.take_rest
            return True
        self.drop_held()
        self.builder.start_call(self._name)
        self._parameters = self._all_parameters.get(self._name, {})
        self._separator = "{"
        self.state = self._in_body
        return True

    def _in_body(self) -> bool:
        if not self.hold_space():
            return False
        for marker in (_PARAMETER, _FUNCTION_END, _CALL_END):
            found = self.is_next(marker)
            if found is None:
                return False
            if found:
                return self._take_body_marker(marker)
        self._end_arguments()
        return self._fail()

    def _take_body_marker(self, marker: str) -> bool:
        self.drop_held()
        if marker == _PARAMETER:
            self.hold(self.position + len(marker))
            self._name = ""
            self.state = self._in_parameter_name
            return True
        if marker == _FUNCTION_END:
            self.position += len(marker)
        self._end_arguments()
        self.state = self._after_function
        return True

    def _end_arguments(self) -> None:
        self.builder.arguments("{}" if self._separator == "{" else "}")

    def _in_parameter_name(self) -> bool:
        taken = self._take_name()
        if taken is None:
            return False
        if not taken:
            self._end_arguments()
            return self._fail()
        self.drop_held()
        self._value.clear()
        self.state = self._in_value
        return True

    def _in_value(self) -> bool:
        end = _VALUE_ENDS.find(self.text, self.position)
        upto = end.start() if end else _VALUE_ENDS.safe_end(self.text, self.position)
        self._value.append(self.text[self.position : upto])
        self.position = upto
        if end is None:
            return False
        if end[0] == _PARAMETER_END:
            self.position = end.end()
        self._tell_parameter(complete=True)
        self.state = self._in_body
        return True

    def _tell_parameter(self, *, complete: bool) -> None:
        text = "".join(self._value).removeprefix("\n")
        if complete:
            text = text.removesuffix("\n")
        schema = self._parameters.get(self._name)
        value = value_as_json(text, schema if isinstance(schema, Mapping) else {})
        if not complete and value.startswith('"'):
            value = value[:-1]
        self.builder.arguments(f"{self._separator}{json.dumps(self._name, ensure_ascii=False)}: {value}")
        self._separator = ", "

    def _after_function(self) -> bool:
        if not self.take_space():
            return False
        closed = self.is_next(_CALL_END)
        if closed is None:
            return False
        if closed:
            self.builder.drop_space()
            self.position += len(_CALL_END)
        self.state = self._in_content
        return True

    def finish(self) -> None:
        """The text is over; a value that was cut short is told as far as it came, markup that was is dropped."""
        if self.state == self._in_value:
            self._value.append(self.text[self.position :])
            self._tell_parameter(complete=False)
            self.position = len(self.text)
        elif self.state in (self._in_body, self._in_parameter_name, self._after_function):
            self.drop_held()
            self.position = len(self.text)
        super().finish()
