"""The parser of one generated sequence: reasoning first, tool calls in what is left."""

from charonia_client.gateway.parsers.deltas import DeltaBuilder, ParsedDelta
from charonia_client.gateway.parsers.machine import ToolMachine
from charonia_client.gateway.parsers.reasoning import ReasoningSplitter


class OutputParser:
    """Parses one sequence that arrives in pieces.

    Any cut of the text into pieces gives deltas with the same concatenation. Only what may still become a marker,
    the part of a call in front of its arguments, and white space next to them are held back. A malformed call is
    content; of one that turns out malformed within its arguments, what follows is. Nothing raises.
    """

    def __init__(
        self, builder: DeltaBuilder, machine: ToolMachine | None, splitter: ReasoningSplitter | None
    ) -> None:
        self._builder = builder
        self._machine = machine
        self._splitter = splitter

    @property
    def saw_tool_calls(self) -> bool:
        """Whether a call has started."""
        return self._builder.num_calls > 0

    def push(self, text: str) -> ParsedDelta:
        """Take the next piece of the text; return what became certain."""
        if self._splitter is None:
            return self._parse("", text)
        return self._parse(*self._splitter.push(text))

    def finish(self) -> ParsedDelta:
        """The text is over: return whatever is held back."""
        reasoning, content = self._splitter.finish() if self._splitter else ("", "")
        if self._machine is None:
            return ParsedDelta(content, reasoning)
        self._machine.push(content)
        self._machine.finish()
        return self._builder.take(reasoning)

    def _parse(self, reasoning: str, content: str) -> ParsedDelta:
        if self._machine is None:
            return ParsedDelta(content, reasoning)
        if content:
            self._machine.push(content)
        return self._builder.take(reasoning)
