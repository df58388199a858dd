"""What rendering a chat template may cost, and checks of single operations against it."""

import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from charonia.errors import InvalidRequestError

_OUTPUT_FACTOR = 8
"""Text may pass through a few macros and `set` blocks before it is output; each time counts."""
_WIDE_FIELD = re.compile(r"\d{5}|\*|\{[^{}]*\{")
"""A field width of five digits or more, or one that is computed."""


class RenderBudget:
    """What one rendering may take: `max_chars` for any string, `seconds` in all."""

    __slots__ = ("_deadline", "_output_left", "_seconds", "max_chars")

    def __init__(self, seconds: float, max_chars: int) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._output_left = _OUTPUT_FACTOR * max_chars
        self.max_chars = max_chars

    def checkpoint(self) -> None:
        """Raise `InvalidRequestError` once the time is up."""
        if time.monotonic() > self._deadline:
            raise InvalidRequestError(f"rendering the chat template took more than {self._seconds:g} s")

    def check_size(self, size: int) -> None:
        """Raise `InvalidRequestError` if a string of `size` characters, or as large a container, is too
        large.
        """
        self.checkpoint()
        if size > self.max_chars:
            raise InvalidRequestError(f"the rendered chat is larger than {self.max_chars} characters")

    def output(self, size: int) -> None:
        """Account for `size` characters that go into the output of a template, macro or block."""
        self._output_left -= size
        self.check_size(0 if self._output_left >= 0 else self.max_chars + 1)

    def check_contents(self, value: Any, *, factor: int = 1) -> None:
        """Raise unless `value`, written out `factor` times, is small enough; the same object counts wherever
        it is.
        """
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, Mapping):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, list | tuple):
                stack.extend(item)
            size += 1
            if (size + len(stack)) * factor > self.max_chars:
                self.check_size((size + len(stack)) * factor)
        self.checkpoint()


current_budget: ContextVar[RenderBudget] = ContextVar("current_budget")
"""The budget of the rendering that this thread is doing."""


def check_replace(text: str, old: str, new: str) -> None:
    """Raise unless replacing `old` by `new` in `text` gives a string that is small enough."""
    found = text.count(old)
    current_budget.get().check_size(len(text) + found * max(len(new) - len(old), 0))


def check_join(separator: str, values: list[Any]) -> None:
    """Raise unless the values, joined, are small enough."""
    budget = current_budget.get()
    budget.check_contents(values)
    budget.check_size(len(separator) * len(values))


def check_format(text: str, marker: str, arguments: Any) -> None:
    """Raise unless formatting `text`, whose fields begin with `marker`, surely gives a small enough string."""
    if _WIDE_FIELD.search(text):
        raise InvalidRequestError("the chat template formats a field of great or computed width")
    budget = current_budget.get()
    budget.check_size(len(text))
    budget.check_contents(arguments, factor=text.count(marker))
