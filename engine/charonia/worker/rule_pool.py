"""Device memory for the constraints of running requests: one stretch of int32 words a row."""

import bisect
from collections.abc import Sequence

import torch


class RulePool:
    """Stretches of one tensor, given and taken back on the host; writes are ordered with the steps that read them.

    words: [P] int32, replaced by a larger tensor when it is full.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.words = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._stretches: list[tuple[int, int, int]] = []
        """(offset, length, row), by offset."""

    def place(self, row: int, words: Sequence[int]) -> int:
        """Store a row's words; returns where they begin."""
        offset = self._find(len(words))
        if offset + len(words) > len(self.words):
            grown = torch.zeros(2 * (offset + len(words)), dtype=torch.int32, device=self.words.device)
            grown[: len(self.words)] = self.words
            self.words = grown
        staged = torch.tensor(words, dtype=torch.int32)
        if self.words.is_cuda:
            staged = staged.pin_memory()
        self.words[offset : offset + len(words)].copy_(staged, non_blocking=True)
        bisect.insort(self._stretches, (offset, len(words), row))
        return offset

    def free(self, row: int) -> None:
        """Take a row's stretch back; steps launched before may still read it, as later writes come after them."""
        self._stretches = [stretch for stretch in self._stretches if stretch[2] != row]

    def _find(self, length: int) -> int:
        """The first gap that is large enough."""
        end = 0
        for offset, size, _ in self._stretches:
            if offset - end >= length:
                break
            end = offset + size
        return end
