"""The part that all formats of tool calls share: a state machine over text that arrives in pieces."""

from collections.abc import Callable, Container

from charonia_client.gateway.parsers.call_reader import CallReader
from charonia_client.gateway.parsers.deltas import DeltaBuilder
from charonia_client.gateway.parsers.json_scanner import JsonValueScanner, Status, skip_space
from charonia_client.gateway.parsers.markers import MarkerFinder, may_become

State = Callable[[], bool]
"""One state: takes text from the front and returns whether to go on; False waits for more text."""


class ToolMachine:
    """A format of tool calls. A subclass adds its states and sets ``state`` to the first.

    Text that no state takes stays in ``text`` from ``position`` on. So that the whole is linear, a state leaves
    no more there than a beginning of a marker; what may belong to a call it holds. Whatever is left or held
    when the sequence ends is content.
    """

    state: State

    def __init__(self, builder: DeltaBuilder) -> None:
        self.builder = builder
        self.text = ""
        self.position = 0
        self._held: list[str] = []
        self._reader = CallReader(builder)
        self._arguments = JsonValueScanner()
        self._then: State = self.take_rest
        self._otherwise: State = self.take_rest

    def push(self, text: str) -> None:
        """Take the next piece of the text."""
        self.text = self.text[self.position :] + text
        self.position = 0
        while self.position < len(self.text) and self.state():
            pass

    def finish(self) -> None:
        """The text is over."""
        self.give_up()
        self.take_rest()
        self.builder.finish()

    def take_rest(self) -> bool:
        """Take all text as content: the state after the last call that is read."""
        self.builder.content(self.text[self.position :])
        self.position = len(self.text)
        return False

    def hold(self, end: int) -> None:
        """Take text up to ``end`` that is content if no call starts after it."""
        self._held.append(self.text[self.position : end])
        self.position = end

    def hold_space(self) -> bool:
        """Hold white space; return whether text is left after it."""
        self.hold(skip_space(self.text, self.position))
        return self.position < len(self.text)

    def give_up(self) -> None:
        """Turn what is held, and a call that has not started, into content."""
        self._held.append(self._reader.raw())
        self._reader = CallReader(self.builder)
        self.builder.content("".join(self._held))
        self._held.clear()

    def drop_held(self) -> None:
        """Forget what is held: it was markup."""
        self._held.clear()

    def take_space(self) -> bool:
        """Take white space as content; return whether text is left after it."""
        end = skip_space(self.text, self.position)
        self.builder.content(self.text[self.position : end])
        self.position = end
        return self.position < len(self.text)

    def take_content(self, finder: MarkerFinder) -> bool:
        """Take content in front of a marker; return whether a marker is next."""
        marker = finder.find(self.text, self.position)
        end = marker.start() if marker else finder.safe_end(self.text, self.position)
        self.builder.content(self.text[self.position : end])
        self.position = end
        return marker is not None

    def is_next(self, marker: str) -> bool | None:
        """Say whether ``marker`` is next; None when more text is needed to know."""
        if self.text.startswith(marker, self.position):
            return True
        return None if may_become(self.text, self.position, marker) else False

    def begin_call(
        self,
        *,
        then: State,
        otherwise: State,
        names: Container[str] | None = None,
        arguments_optional: bool = True,
    ) -> None:
        """Read a call that is a JSON object.

        Args:
            then: the state after the call; also after one that turned out malformed when it had started: what was
                told of it stays.
            otherwise: the state after what was no call: it is content.
            names: the only names it may have; any, when None.
            arguments_optional: whether a name alone is a call.
        """
        if not self.builder.may_start:
            self.give_up()
            self.state = self.take_rest
            return
        self._reader = CallReader(self.builder, names=names, arguments_optional=arguments_optional)
        self._then, self._otherwise = then, otherwise
        self.state = self._in_call

    def _in_call(self) -> bool:
        self.position = self._reader.feed(self.text, self.position)
        if self._reader.started:
            self._held.clear()
        if self._reader.status is Status.OPEN:
            return False
        self.state = self._then if self._reader.started else self._otherwise
        self.give_up()
        return True

    def begin_arguments(self, name: str, *, then: State) -> None:
        """Start a call whose name is known; its arguments, a JSON object, are next. ``then`` follows in any case."""
        if not self.builder.may_start:
            self.give_up()
            self.state = self.take_rest
            return
        self._held.clear()
        self.builder.start_call(name)
        self._arguments = JsonValueScanner()
        self._then = then
        self.state = self._in_arguments

    def _in_arguments(self) -> bool:
        self.position = self._arguments.feed(self.text, self.position)
        self.builder.arguments(self._arguments.take())
        if self._arguments.status is Status.OPEN:
            return False
        self.state = self._then
        return True


class ArrayMachine(ToolMachine):
    """A format with a JSON array of calls in it."""

    def begin_array(self, then: State) -> None:
        """Read an array of calls, whose bracket is next; ``then`` follows, after a malformed one too."""
        self._after_array = then
        self.hold(self.position + 1)
        self.begin_call(then=self._after_item, otherwise=then)

    def _after_item(self) -> bool:
        if not self.take_space():
            return False
        if self.text[self.position] == ",":
            self.builder.drop_space()
            self.hold(self.position + 1)
            self.begin_call(then=self._after_item, otherwise=self._after_array)
            return True
        if self.text[self.position] == "]":
            self.builder.drop_space()
            self.position += 1
        self.state = self._after_array
        return True
