"""What a parser makes of generated text, and the builder that gathers it."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

MAX_TOOL_CALLS = 128
"""Tool calls in one generated sequence; what looks like a further one is content."""

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one tool call.

    Attributes:
        index: which call of the sequence, from 0.
        id: the identity of the call, in its first delta only.
        name: the function called, in the first delta only.
        arguments: a piece of JSON text; the pieces of a call concatenate to its arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedDelta:
    """What has become certain since the delta before.

    Attributes:
        content: text of the answer.
        reasoning: text of the reasoning before the answer.
        tool_calls: pieces of tool calls, in order.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


NOTHING = ParsedDelta()


def random_call_id() -> str:
    """Return an identity of the kind that OpenAI gives."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Return nine letters and digits, the only identities that Mistral's chat templates take."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(slots=True)
class _CallPieces:
    index: int
    id: str | None
    name: str | None
    arguments: list[str]


class DeltaBuilder:
    """Gathers content and tool calls between two deltas.

    White space at the start of the content and after a call is layout when a call follows: it is held back
    until something visible shows that it is text. Of more calls than ``told_calls`` the first ones are told.
    """

    def __init__(
        self, call_id: Callable[[], str] = random_call_id, *, told_calls: int = MAX_TOOL_CALLS
    ) -> None:
        self._call_id = call_id
        self._told_calls = told_calls
        self._content: list[str] = []
        self._space: list[str] = []
        self._at_edge = True
        self._calls: list[_CallPieces] = []
        self._num_calls = 0

    @property
    def num_calls(self) -> int:
        """The calls started so far."""
        return self._num_calls

    @property
    def may_start(self) -> bool:
        """Whether a further call is within the cap."""
        return self._num_calls < MAX_TOOL_CALLS

    def content(self, text: str) -> None:
        """Add text of the answer."""
        if not text:
            return
        if self._at_edge:
            if text.isspace():
                self._space.append(text)
                return
            self._at_edge = False
            self._content.extend(self._space)
            self._space.clear()
        self._content.append(text)

    def drop_space(self) -> None:
        """Forget the white space that is held back: a marker next to it showed that it is layout."""
        self._space.clear()

    def start_call(self, name: str) -> None:
        """Begin the next call."""
        self._space.clear()
        self._at_edge = True
        self._calls.append(_CallPieces(self._num_calls, self._call_id(), name, []))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """Add text to the arguments of the call begun last."""
        if not text:
            return
        if not self._calls:
            self._calls.append(_CallPieces(self._num_calls - 1, None, None, []))
        self._calls[-1].arguments.append(text)

    def finish(self) -> None:
        """The sequence is over: white space that was held back is content unless calls came."""
        if not self._num_calls:
            self._content.extend(self._space)
        self._space.clear()

    def take(self, reasoning: str = "") -> ParsedDelta:
        """Return what has gathered since the last time, together with ``reasoning``."""
        if not (self._content or self._calls):
            return ParsedDelta(reasoning=reasoning) if reasoning else NOTHING
        if not self._calls:
            delta = ParsedDelta("".join(self._content), reasoning)
            self._content.clear()
            return delta
        calls = tuple(
            ToolCallDelta(call.index, call.id, call.name, "".join(call.arguments))
            for call in self._calls
            if call.index < self._told_calls
        )
        delta = ParsedDelta("".join(self._content), reasoning, calls)
        self._content.clear()
        self._calls.clear()
        return delta
