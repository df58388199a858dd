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
        self._state: Callable[[str, int], int] = self._between
        self._next: Callable[[str, int], int] = self._value
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
            self._await(self._after_item)
        else:
            self.status = Status.DONE

    def _take(self, character: str, position: int) -> int:
        self._out.append(character)
        return position + 1

    # Between tokens, `_next` gets the next character that is no white space.

    def _await(self, state: Callable[[str, int], int]) -> None:
        self._state = self._between
        self._next = state

    def _between(self, text: str, position: int) -> int:
        end = skip_space(text, position)
        if end > position:
            self._out.append(text[position:end])
        return self._next(text[end], end) if end < len(text) else end

    def _value(self, character: str, position: int) -> int:
        if character == '"':
            self._state = self._string
            self._after_string = self._end_value
        elif character in "{[":
            if len(self._closers) == MAX_DEPTH:
                return self._fail(position)
            self._closers.append("}" if character == "{" else "]")
            self._await(self._first_key if character == "{" else self._first_item)
        elif character in _SCALAR_STARTS:
            self._scalar = ""
            self._state = self._in_scalar
            return position
        else:
            return self._fail(position)
        return self._take(character, position)

    def _first_key(self, character: str, position: int) -> int:
        if character == "}":
            return self._close(character, position)
        return self._key(character, position)

    def _key(self, character: str, position: int) -> int:
        if character != '"':
            return self._fail(position)
        self._state = self._string
        self._after_string = self._expect_colon
        return self._take(character, position)

    def _expect_colon(self) -> None:
        self._await(self._colon)

    def _colon(self, character: str, position: int) -> int:
        if character != ":":
            return self._fail(position)
        self._await(self._value)
        return self._take(character, position)

    def _first_item(self, character: str, position: int) -> int:
        if character == "]":
            return self._close(character, position)
        return self._value(character, position)

    def _after_item(self, character: str, position: int) -> int:
        if character == self._closers[-1]:
            return self._close(character, position)
        if character != ",":
            return self._fail(position)
        self._await(self._key if self._closers[-1] == "}" else self._value)
        return self._take(character, position)

    def _close(self, character: str, position: int) -> int:
        self._closers.pop()
        self._end_value()
        return self._take(character, position)

    # Within a token.

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
            self._after_string()
        elif character == "\\":
            self._state = self._escape
        else:
            character = json.dumps(character)[1:-1]
        return self._take(character, position)

    def _escape(self, text: str, position: int) -> int:
        character = text[position]
        if character == "u":
            self._hex_digits = 4
            self._state = self._in_hex
        elif character in '"\\/bfnrt':
            self._state = self._string
        else:
            return self._fail(position)
        return self._take(character, position)

    def _in_hex(self, text: str, position: int) -> int:
        character = text[position]
        if character not in _HEX:
            return self._fail(position)
        self._hex_digits -= 1
        if not self._hex_digits:
            self._state = self._string
        return self._take(character, position)
