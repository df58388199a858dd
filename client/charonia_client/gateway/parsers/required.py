"""Tool calls that a grammar made: nothing but JSON, for ``tool_choice`` required or a named function."""

from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.machine import ArrayMachine, ToolMachine


class RequiredMachine(ArrayMachine):
    """A JSON array of ``{"name": ..., "parameters": {...}}``."""

    def __init__(self, builder: DeltaBuilder) -> None:
        super().__init__(builder)
        self.state = self._start

    def _start(self) -> bool:
        if not self.take_space():
            return False
        if self.text[self.position] == "[":
            self.begin_array(then=self.take_rest)
        else:
            self.state = self.take_rest
        return True


class NamedMachine(ToolMachine):
    """The bare arguments of the function that the request names."""

    def __init__(self, builder: DeltaBuilder, name: str) -> None:
        super().__init__(builder)
        self._name = name
        self.state = self._start

    def _start(self) -> bool:
        if not self.take_space():
            return False
        if self.text[self.position] == "{":
            self.begin_arguments(self._name, then=self.take_rest)
        else:
            self.state = self.take_rest
        return True
