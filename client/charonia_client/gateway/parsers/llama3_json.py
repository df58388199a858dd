"""``{"name": ..., "parameters": {...}}``, several with ``;`` between, maybe after ``<|python_tag|>``: Llama 3."""

from collections.abc import Container

from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.machine import ToolMachine
from charonia_client.gateway.parsers.markers import MarkerFinder

_TAG = "<|python_tag|>"
_FINDER = MarkerFinder([_TAG])


class Llama3JsonMachine(ToolMachine):
    """Calls at the start of the text, or after the tag anywhere.

    Without a tag nothing tells a call from an answer in JSON but its name, so that has to be one of the tools'.
    """

    def __init__(self, builder: DeltaBuilder, names: Container[str]) -> None:
        super().__init__(builder)
        self._names = names
        self.state = self._start

    def _start(self) -> bool:
        if not self.take_space():
            return False
        if self.text[self.position] == "{":
            self._begin_untagged()
            return True
        self.state = self._in_content
        return True

    def _begin_untagged(self) -> None:
        self.begin_call(
            then=self._after_call, otherwise=self._in_content, names=self._names, arguments_optional=False
        )

    def _in_content(self) -> bool:
        if not self.take_content(_FINDER):
            return False
        self.hold(self.position + len(_TAG))
        self.begin_call(then=self._after_call, otherwise=self._in_content)
        return True

    def _after_call(self) -> bool:
        if not self.take_space():
            return False
        if self.text[self.position] == ";":
            self.builder.drop_space()
            self.hold(self.position + 1)
            self._begin_untagged()
        elif self.text[self.position] == "{":
            self._begin_untagged()
        else:
            self.state = self._in_content
        return True
