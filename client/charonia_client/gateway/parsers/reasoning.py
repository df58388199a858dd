"""Splits the reasoning of a model from its answer."""

from collections.abc import Callable
from dataclasses import dataclass

from charonia_client.gateway.parsers.markers import MarkerFinder


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning.

    Attributes:
        opening: what reasoning begins with; the prompt may hold it already.
        closing: what it ends with.
        always: whether the text begins with reasoning even without the opening.
    """

    opening: str
    closing: str
    always: bool = False


class ReasoningSplitter:
    """Splits one text that arrives in pieces.

    Reasoning stands at the start of the text, once. Line breaks next to the marks belong to the layout and are
    dropped. Reasoning that never closes is reasoning to the end.
    """

    def __init__(self, marks: ReasoningFormat, *, opened: bool = False) -> None:
        self._marks = marks
        self._implied = opened or marks.always
        self._closing = MarkerFinder([marks.closing])
        self._state: Callable[[], bool] = self._start
        self._text = ""
        self._position = 0
        self._final = False
        self._breaks: list[str] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece; return the reasoning and the content that became certain."""
        if self._state == self._in_content and not self._position < len(self._text):
            return "", text
        self._text = self._text[self._position :] + text
        self._position = 0
        while self._position < len(self._text) and self._state():
            pass
        reasoning, content = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """The text is over; return what was held back."""
        self._final = True
        rest = self.push("")
        if self._state == self._start and not self._implied:
            return rest[0], rest[1] + "".join(self._breaks)
        return rest

    def _take_breaks(self) -> bool:
        """Put line breaks aside; return whether text is left."""
        rest = self._text[self._position :].lstrip("\r\n")
        end = len(self._text) - len(rest)
        if end > self._position:
            self._breaks.append(self._text[self._position : end])
            self._position = end
        return bool(rest)

    def _start(self) -> bool:
        if not self._take_breaks():
            return False
        opening = self._marks.opening
        if self._text.startswith(opening, self._position):
            self._breaks.clear()
            self._position += len(opening)
            self._state = self._after_opening
            return True
        if not self._final and opening.startswith(self._text[self._position :]):
            return False
        self._state = self._in_reasoning if self._implied else self._in_content
        if not self._implied:
            self._content.extend(self._breaks)
        self._breaks.clear()
        return True

    def _after_opening(self) -> bool:
        if not self._take_breaks():
            return False
        self._breaks.clear()
        self._state = self._in_reasoning
        return True

    def _in_reasoning(self) -> bool:
        closing = self._closing.find(self._text, self._position)
        if closing is not None:
            end = closing.start()
        elif self._final:
            end = len(self._text)
        else:
            end = self._closing.safe_end(self._text, self._position)
        piece = self._text[self._position : end]
        visible = piece.rstrip("\r\n")
        if visible:
            self._reasoning.extend([*self._breaks, visible])
            self._breaks.clear()
        if len(visible) < len(piece):
            self._breaks.append(piece[len(visible) :])
        self._position = end
        if closing is None:
            return False
        self._breaks.clear()
        self._position = closing.end()
        self._state = self._after_closing
        return True

    def _after_closing(self) -> bool:
        if not self._take_breaks():
            return False
        self._breaks.clear()
        self._state = self._in_content
        return True

    def _in_content(self) -> bool:
        self._content.append(self._text[self._position :])
        self._position = len(self._text)
        return False
