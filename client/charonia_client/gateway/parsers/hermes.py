"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5 and Qwen3, SmolLM."""

import re

from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.machine import ToolMachine
from charonia_client.gateway.parsers.markers import MarkerFinder

_OPENING = "<tool_call>"
_CLOSING = "</tool_call>"
_FINDER = MarkerFinder([_OPENING])
_TAIL = re.compile(r"[\s}\],]*")
"""What may stand between a call and its closing tag, and goes with it: models miscount their braces."""


class HermesMachine(ToolMachine):
    """Calls between tags, anywhere in the text."""

    def __init__(self, builder: DeltaBuilder) -> None:
        super().__init__(builder)
        self.state = self._in_content

    def _in_content(self) -> bool:
        if not self.take_content(_FINDER):
            return False
        self.hold(self.position + len(_OPENING))
        self.begin_call(then=self._after_call, otherwise=self._in_content)
        return True

    def _after_call(self) -> bool:
        tail = _TAIL.match(self.text, self.position)
        self.hold(tail.end() if tail else self.position)
        if self.position == len(self.text):
            return False
        closed = self.is_next(_CLOSING)
        if closed is None:
            return False
        if closed:
            self.drop_held()
            self.position += len(_CLOSING)
        else:
            self.give_up()
        self.state = self._in_content
        return True

    def finish(self) -> None:
        """The text is over; a closing tag that was cut short is no content."""
        if self.state == self._after_call and self.position < len(self.text):
            self.drop_held()
            self.position = len(self.text)
        super().finish()
