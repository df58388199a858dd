"""One int32 allocation for everything that plans change on the device, and how the host writes to it.

Row state and step inputs are views of the arena, so any mix of changes is one copy and one scatter kernel:

    pinned buffer   | (dest, src, length) x MAX_SEGMENTS | values ... |
                          one host-to-device copy ↓   ↓ one kernel
    arena           | token_ids | block_table | num_computed | params | rows | query_start_loc | samples |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from charonia_kernels import apply_writes

IntArray = npt.NDArray[np.int32]

MAX_SEGMENTS = 2048
"""Writes in one copy; more of them take another."""
_BUFFER_INTS = 1 << 20
_NUM_BUFFERS = 3
_ALIGNMENT = 32
"""Every view begins at a multiple of 128 bytes, as vectorised loads want it."""


class Arena:
    """Named int32 tensors in one allocation.

    tensors: the views by name, zeroed. offsets: where each begins in `storage`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self.offsets: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            self.offsets[name] = size
            size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        if device.type == "cpu":
            # numpy takes zeroed pages from the system as they are first written; torch.zeros writes them all.
            self.storage = torch.from_numpy(np.zeros(size, np.int32))
        else:
            self.storage = torch.zeros(size, dtype=torch.int32, device=device)
        self.tensors = {
            name: self.storage[self.offsets[name] :][: math.prod(shape)].view(shape)
            for name, shape in shapes.items()
        }


class ArenaWriter(Protocol):
    """Writes to an arena, in order, from the thread that launches steps."""

    def write(self, dest: int, values: Sequence[int] | IntArray) -> None:
        """Set `storage[dest : dest + len(values)]`. Writes between two flushes must not overlap."""

    def flush(self) -> None:
        """Make all writes visible to work that is launched from now on."""

    def dry_run(self) -> None:
        """Launch what `flush` launches, without a write."""


class DirectWriter:
    """For an arena in the host's memory."""

    def __init__(self, arena: Arena) -> None:
        self._storage = arena.storage.numpy()

    def write(self, dest: int, values: Sequence[int] | IntArray) -> None:
        """As `ArenaWriter`."""
        self._storage[dest : dest + len(values)] = values

    def flush(self) -> None:
        """Nothing is pending."""

    def dry_run(self) -> None:
        """Nothing is launched."""


class StagedWriter:
    """For an arena on a GPU. The host never waits for the device but to reuse a buffer that is still being copied."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena.storage
        self._staged = torch.empty(_BUFFER_INTS, dtype=torch.int32, device=arena.storage.device)
        self._pinned = [
            torch.empty(_BUFFER_INTS, dtype=torch.int32, pin_memory=True) for _ in range(_NUM_BUFFERS)
        ]
        self._copied = [torch.Event("cuda") for _ in range(_NUM_BUFFERS)]
        self._views: list[IntArray] = [pinned.numpy() for pinned in self._pinned]
        self._current = 0
        self._num_segments = 0
        self._end = 3 * MAX_SEGMENTS

    def write(self, dest: int, values: Sequence[int] | IntArray) -> None:
        """As `ArenaWriter`."""
        first, count = 0, len(values)
        while first < count:
            if self._num_segments == MAX_SEGMENTS or self._end == _BUFFER_INTS:
                self.flush()
            length = min(count - first, _BUFFER_INTS - self._end)
            buffer, end = self._views[self._current], self._end + length
            buffer[self._end : end] = values if length == count else values[first : first + length]
            header = 3 * self._num_segments
            buffer[header : header + 3] = (dest + first, self._end, length)
            self._num_segments += 1
            self._end = end
            first += length

    def flush(self) -> None:
        """As `ArenaWriter`: one copy and one kernel, or nothing when nothing was written."""
        if self._num_segments == 0:
            return
        pinned, copied = self._pinned[self._current], self._copied[self._current]
        self._staged[: self._end].copy_(pinned[: self._end], non_blocking=True)
        copied.record()
        apply_writes(self._arena, self._staged, self._num_segments)
        self._current = (self._current + 1) % _NUM_BUFFERS
        self._copied[self._current].synchronize()
        self._num_segments = 0
        self._end = 3 * MAX_SEGMENTS

    def dry_run(self) -> None:
        """As `ArenaWriter`."""
        apply_writes(self._arena, self._staged, 0)


def writer_for(arena: Arena) -> ArenaWriter:
    """The writer that fits the arena's device."""
    return DirectWriter(arena) if arena.storage.device.type == "cpu" else StagedWriter(arena)
