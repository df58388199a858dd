"""The arena's views, and that what is written to it arrives, in whatever pieces the writer sends it."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from charonia.worker import arena as arena_module
from charonia.worker.arena import Arena, DirectWriter, StagedWriter, writer_for

CPU = torch.device("cpu")
MakeWriter = Callable[..., tuple[StagedWriter, list[int]]]
HEADER = 3
"""int32 words that describe one segment."""


class FakeEvent:
    """pending: recorded, and not waited for since."""

    def __init__(self, device: str) -> None:
        assert device == "cuda"
        self.pending = False

    def record(self) -> None:
        self.pending = True

    def synchronize(self) -> None:
        self.pending = False


def small_arena(size: int = 1000) -> Arena:
    return Arena({"all": (size,)}, CPU)


def test_views_are_apart_aligned_and_zero() -> None:
    arena = Arena({"a": (3, 5), "b": (1,), "c": (32,), "d": (2,)}, CPU)
    assert [tuple(tensor.shape) for tensor in arena.tensors.values()] == [(3, 5), (1,), (32,), (2,)]
    assert arena.offsets == {"a": 0, "b": 32, "c": 64, "d": 96}
    assert arena.storage.dtype == torch.int32
    assert not arena.storage.any()
    for value, (name, tensor) in enumerate(arena.tensors.items(), 1):
        tensor.fill_(value)
        assert arena.storage[arena.offsets[name]] == value
    assert [tensor.unique().tolist() for tensor in arena.tensors.values()] == [[1], [2], [3], [4]]


def test_a_host_arena_is_written_at_once() -> None:
    arena = Arena({"a": (4,), "b": (2, 3)}, CPU)
    writer = writer_for(arena)
    assert isinstance(writer, DirectWriter)
    writer.write(arena.offsets["a"] + 1, [7, 8])
    writer.write(arena.offsets["b"] + 3, np.array([1, 2, 3], np.int32))
    writer.write(arena.offsets["a"], [])
    assert arena.tensors["a"].tolist() == [0, 7, 8, 0]
    assert arena.tensors["b"].tolist() == [[0, 0, 0], [1, 2, 3]]
    writer.flush()
    writer.dry_run()
    assert arena.storage.count_nonzero() == 5


@pytest.fixture
def staged_writer(monkeypatch: pytest.MonkeyPatch) -> MakeWriter:
    """Makes a writer over an arena in the host's memory, and the list of the numbers of segments that it sends."""

    def make(arena: Arena, *, segments: int, values: int) -> tuple[StagedWriter, list[int]]:
        def empty(size: int, *, dtype: torch.dtype, **_: object) -> torch.Tensor:
            return torch.full((size,), -1, dtype=dtype)

        sent: list[int] = []
        real = arena_module.apply_writes

        def apply_writes(target: torch.Tensor, staged: torch.Tensor, count: int) -> None:
            sent.append(count)
            real(target, staged, count)

        fake_torch = SimpleNamespace(empty=empty, Event=FakeEvent, int32=torch.int32)
        monkeypatch.setattr(arena_module, "torch", fake_torch)
        monkeypatch.setattr(arena_module, "apply_writes", apply_writes)
        monkeypatch.setattr(arena_module, "MAX_SEGMENTS", segments)
        monkeypatch.setattr(arena_module, "_BUFFER_INTS", HEADER * segments + values)
        return StagedWriter(arena), sent

    return make


def test_staged_writes_arrive_with_the_flush(staged_writer: MakeWriter) -> None:
    arena = small_arena()
    writer, sent = staged_writer(arena, segments=4, values=50)
    writer.flush()
    assert sent == [], "nothing was written"
    writer.write(3, [1, 2, 3])
    writer.write(500, np.array([9], np.int32))
    writer.write(7, [])
    assert not arena.storage.any()
    writer.flush()
    assert sent == [2]
    assert arena.storage[:8].tolist() == [0, 0, 0, 1, 2, 3, 0, 0]
    assert arena.storage[500] == 9
    assert arena.storage.count_nonzero() == 4
    writer.flush()
    assert sent == [2]
    writer.dry_run()
    assert sent == [2, 0]
    assert arena.storage.count_nonzero() == 4


@pytest.mark.parametrize("length", [1, 49, 50, 51, 100, 101, 137])
@pytest.mark.parametrize("before", [0, 1, 13, 49])
def test_long_writes_are_split(staged_writer: MakeWriter, length: int, before: int) -> None:
    arena = small_arena()
    writer, sent = staged_writer(arena, segments=4, values=50)
    writer.write(0, [5] * before)
    writer.write(200, list(range(1, length + 1)))
    writer.flush()
    expected = torch.zeros_like(arena.storage)
    expected[:before] = 5
    expected[200 : 200 + length] = torch.arange(1, length + 1)
    assert arena.storage.equal(expected)
    assert len(sent) == -(-(before + length) // 50)
    assert sum(sent) == len(sent) + (before > 0), "no segment is empty"


def test_many_writes_take_several_copies(staged_writer: MakeWriter) -> None:
    arena = small_arena()
    writer, sent = staged_writer(arena, segments=4, values=50)
    for i in range(11):
        writer.write(10 * i, [i + 1, i + 2])
    writer.flush()
    assert sent == [4, 4, 3]
    for i in range(11):
        assert arena.storage[10 * i :][:3].tolist() == [i + 1, i + 2, 0]


def test_a_buffer_is_not_written_while_it_is_being_copied(staged_writer: MakeWriter) -> None:
    arena = small_arena()
    writer, _ = staged_writer(arena, segments=4, values=50)
    used = []
    for i in range(8):
        assert not writer._copied[writer._current].pending
        used.append(writer._current)
        writer.write(i, [i + 1])
        writer.flush()
        assert writer._copied[used[-1]].pending, "the host does not wait for the copy just started"
    assert used == [0, 1, 2, 0, 1, 2, 0, 1]
    assert arena.storage[:9].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
