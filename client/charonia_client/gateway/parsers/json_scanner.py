"""One JSON value, validated while it arrives in pieces: linear in its length, bounded in its depth."""

import enum
import json
import re
from collections.abc import Callable

MAX_DEPTH = 128
"""Nesting of objects and arrays; deeper values are malformed."""

MAX_SCALAR_LENGTH = 512
"""Characters of a number."""

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_LEGAL_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_SCALAR_STARTS = frozenset("-0123456789tfn")
_HEX = frozenset("0123456789abcdefABCDEF")


def skip_space(text: str, position: int) -> int:
    """Return the position of the first character from ``position`` that is not JSON's white space."""
    space = _SPACE.match(text, position)
    return space.end() if space else position


class Status(enum.Enum):
    """How far a value has come."""

    OPEN = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class JsonValueScanner:
    """Takes one JSON value from the front of a text.

    Control characters inside strings, which JSON forbids and models write, come out escaped; everything else
    comes out as it stands. A number or literal ends where the character after it shows so.
    """

    def __init__(self) -> None:
        self.status = Status.OPEN
        self._state: Callable[[str, int], int] = self._value
        self._after_string: Callable[[], None] = self._end_value
        self._closers: list[str] = []
        self._scalar = ""
        self._hex_digits = 0
        self._out: list[str] = []

    def feed(self, text: str, start: int) -> int:
        """Read on from ``start``; return where the value ended, failed, or the text did."""
        position = start
        while position < len(text) and self.status is Status.OPEN:
            position = self._state(text, position)
        return position

    def take(self) -> str:
        """Return the text of the value that came since the last time."""
        taken = "".join(self._out)
        self._out.clear()
        return taken

    def _fail(self, position: int) -> int:
        self.status = Status.FAILED
        return position

    def _end_value(self) -> None:
        if self._closers:
            self._state = self._after_item
        else:
            self.status = Status.DONE

    def _skip_space(self, text: str, position: int) -> int:
        end = skip_space(text, position)
        if end > position:
            self._out.append(text[position:end])
        return end

    def _step(self, character: str, state: Callable[[str, int], int]) -> None:
        self._out.append(character)
        self._state = state

    def _value(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        character = text[position]
        if character == '"':
            self._step(character, self._string)
            self._after_string = self._end_value
        elif character in "{[":
            if len(self._closers) == MAX_DEPTH:
                return self._fail(position)
            self._closers.append("}" if character == "{" else "]")
            self._step(character, self._first_key if character == "{" else self._first_item)
        elif character in _SCALAR_STARTS:
            self._scalar = ""
            self._state = self._in_scalar
            return position
        else:
            return self._fail(position)
        return position + 1

    def _in_scalar(self, text: str, position: int) -> int:
        run = _SCALAR.match(text, position)
        if run is not None:
            piece = run[0][: MAX_SCALAR_LENGTH - len(self._scalar)]
            self._scalar += piece
            self._out.append(piece)
            end = position + len(piece)
            return end if end == run.end() else self._fail(end)
        if _LEGAL_SCALAR.fullmatch(self._scalar) is None:
            return self._fail(position)
        self._end_value()
        return position

    def _string(self, text: str, position: int) -> int:
        run = _PLAIN.match(text, position)
        if run is not None:
            self._out.append(run[0])
            return run.end()
        character = text[position]
        if character == '"':
            self._out.append(character)
            self._after_string()
        elif character == "\\":
            self._step(character, self._escape)
        else:
            self._out.append(json.dumps(character)[1:-1])
        return position + 1

    def _escape(self, text: str, position: int) -> int:
        character = text[position]
        if character == "u":
            self._hex_digits = 4
            self._step(character, self._in_hex)
        elif character in '"\\/bfnrt':
            self._step(character, self._string)
        else:
            return self._fail(position)
        return position + 1

    def _in_hex(self, text: str, position: int) -> int:
        character = text[position]
        if character not in _HEX:
            return self._fail(position)
        self._hex_digits -= 1
        self._step(character, self._in_hex if self._hex_digits else self._string)
        return position + 1

    def _first_key(self, text: str, position: int) -> int:
        return self._key_or_close(text, position, may_close=True)

    def _key(self, text: str, position: int) -> int:
        return self._key_or_close(text, position, may_close=False)

    def _key_or_close(self, text: str, position: int, *, may_close: bool) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        character = text[position]
        if character == '"':
            self._step(character, self._string)
            self._after_string = self._expect_colon
        elif character == "}" and may_close:
            self._close(character)
        else:
            return self._fail(position)
        return position + 1

    def _expect_colon(self) -> None:
        self._state = self._colon

    def _colon(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if text[position] != ":":
            return self._fail(position)
        self._step(":", self._value)
        return position + 1

    def _first_item(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if text[position] == "]":
            self._close("]")
            return position + 1
        self._state = self._value
        return position

    def _after_item(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        character = text[position]
        if character == self._closers[-1]:
            self._close(character)
        elif character == ",":
            self._step(character, self._key if self._closers[-1] == "}" else self._value)
        else:
            return self._fail(position)
        return position + 1

    def _close(self, character: str) -> None:
        self._out.append(character)
        self._closers.pop()
        self._end_value()
