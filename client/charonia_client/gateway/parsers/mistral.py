"""``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`` and ``[TOOL_CALLS]name[ARGS]{...}``: Mistral."""

import re

from charonia_client.gateway.parsers.call_reader import MAX_NAME_LENGTH
from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.machine import ArrayMachine
from charonia_client.gateway.parsers.markers import MarkerFinder

_CALLS = "[TOOL_CALLS]"
_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_FINDER = MarkerFinder([_CALLS])
_WORD = re.compile(r"[\w.:/-]+")


class MistralMachine(ArrayMachine):
    """Calls after the marker, in either form, anywhere in the text."""

    def __init__(self, builder: DeltaBuilder) -> None:
        super().__init__(builder)
        self.state = self._in_content
        self._name = ""
        self._id_length = 0

    def _in_content(self) -> bool:
        if not self.take_content(_FINDER):
            return False
        self.hold(self.position + len(_CALLS))
        self.state = self._after_marker
        return True

    def _after_marker(self) -> bool:
        if not self.hold_space():
            return False
        if self.text[self.position] == "[":
            self.begin_array(then=self._in_content)
        else:
            self._name = ""
            self._id_length = 0
            self.state = self._in_name
        return True

    def _fail(self) -> bool:
        self.give_up()
        self.state = self._in_content
        return True

    def _in_name(self) -> bool:
        word = _WORD.match(self.text, self.position)
        if word is None:
            self.state = self._after_name
            return True
        piece = word[0][: MAX_NAME_LENGTH - len(self._name)]
        self._name += piece
        self.hold(self.position + len(piece))
        return True if self.position == word.end() else self._fail()

    def _after_name(self) -> bool:
        if not self.hold_space():
            return False
        for marker, state in ((_ID, self._in_id), (_ARGUMENTS, self._before_arguments)):
            found = self.is_next(marker)
            if found is None:
                return False
            if found:
                self.hold(self.position + len(marker))
                self.state = state
                return True
        return self._before_arguments()

    def _in_id(self) -> bool:
        word = _WORD.match(self.text, self.position)
        if word is None:
            self.state = self._after_name
            return True
        end = min(word.end(), self.position + MAX_NAME_LENGTH - self._id_length)
        self._id_length += end - self.position
        self.hold(end)
        return True if end == word.end() else self._fail()

    def _before_arguments(self) -> bool:
        if not self.hold_space():
            return False
        if not self._name or self.text[self.position] != "{":
            return self._fail()
        self.begin_arguments(self._name, then=self._in_content)
        return True
