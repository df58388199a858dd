"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5 and Qwen3, SmolLM."""

from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.machine import ToolMachine
from charonia_client.gateway.parsers.markers import MarkerFinder

_OPENING = "<tool_call>"
_CLOSING = "</tool_call>"
_FINDER = MarkerFinder([_OPENING])


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
        if not self.take_space():
            return False
        closed = self.is_next(_CLOSING)
        if closed is None:
            return False
        if closed:
            self.builder.drop_space()
            self.position += len(_CLOSING)
        self.state = self._in_content
        return True

    def finish(self) -> None:
        """The text is over; a closing tag that was cut short is no content."""
        if self.state == self._after_call and self.is_next(_CLOSING) is None:
            self.position = len(self.text)
        super().finish()
