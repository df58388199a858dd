"""Keeps what was asked for last, bounded by number and by an estimate of the memory behind it."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

MAX_CACHED_GRAMMARS = 128
MAX_CACHED_BYTES = 256 << 20


class Sized(Protocol):
    """What knows its memory; it may grow while it is kept."""

    @property
    def num_bytes(self) -> int:
        """An estimate."""


Item = TypeVar("Item", bound=Sized)


class GrammarCache(Generic[Item]):
    """Items by key, those that were asked for longest ago forgotten first. For one thread.

    What users of an item hold stays theirs when it is forgotten.
    """

    def __init__(self, max_items: int = MAX_CACHED_GRAMMARS, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items: OrderedDict[bytes, Item] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: bytes) -> Item | None:
        """The item of a key, which is thereby asked for."""
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: bytes, item: Item) -> None:
        """Keep an item, of which the memory of older ones is taken if need be; the newest always stays."""
        self._items[key] = item
        self._items.move_to_end(key)
        total = sum(kept.num_bytes for kept in self._items.values())
        while len(self._items) > 1 and (len(self._items) > self._max_items or total > self._max_bytes):
            total -= self._items.popitem(last=False)[1].num_bytes
