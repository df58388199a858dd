"""Calls are made by children first, and then by the parent."""

import os
import time
from pathlib import Path

import pytest
from charonia_kernels.gpu.compile_ahead import ForkingExecutor


def note(path: Path) -> int:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return os.getpid()


def test_each_call_is_made_by_a_child_and_by_the_parent(tmp_path: Path) -> None:
    executor = ForkingExecutor(3, lambda _: note(tmp_path / "finished"))
    futures = [executor.submit(note, tmp_path / str(i)) for i in range(7)]
    assert not any(future.done() for future in futures)
    executor.run()
    assert [future.result() for future in futures] == [os.getpid()] * 7
    children = []
    for i in range(7):
        child, parent = (tmp_path / str(i)).read_text().split()
        assert int(parent) == os.getpid()
        children.append(int(child))
    assert os.getpid() not in children and len(set(children)) <= 3
    assert sorted((tmp_path / "finished").read_text().split()) == sorted(map(str, children))


def test_a_long_call_keeps_no_other_waiting(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(6)]

    def wait_for_the_others() -> int:
        deadline = time.monotonic() + 20.0
        while not all(path.exists() for path in paths):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return note(tmp_path / "long")

    executor = ForkingExecutor(2, lambda _: None)
    executor.submit(wait_for_the_others)
    for path in paths:
        executor.submit(note, path)
    executor.run()
    long = (tmp_path / "long").read_text().split()[0]
    assert all(path.read_text().split()[0] != long for path in paths)


def test_what_fails_in_a_child_raises_in_the_parent(tmp_path: Path) -> None:
    def fail() -> None:
        note(tmp_path / "tries")
        raise RuntimeError("no such instruction")

    executor = ForkingExecutor(2, lambda _: None)
    bad, good = executor.submit(fail), executor.submit(note, tmp_path / "good")
    executor.run()
    with pytest.raises(RuntimeError, match="no such instruction"):
        bad.result()
    assert good.result() == os.getpid()
    assert len((tmp_path / "tries").read_text().split()) == 2


def test_long_calls_come_first(tmp_path: Path) -> None:
    executor = ForkingExecutor(1, lambda _: None)
    order = []
    for name, is_long in (("a", False), ("b", True), ("c", False)):
        executor.is_long = is_long
        executor.submit(order.append, name)
    executor.run()
    assert order == ["b", "a", "c"]


def test_the_parent_follows_while_children_go_on(tmp_path: Path) -> None:
    quick = tmp_path / "quick"

    def wait_for_both() -> bool:
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            if quick.exists() and len(quick.read_text().split()) == 2:
                return True
            time.sleep(0.01)
        return False

    executor = ForkingExecutor(2, lambda result: note(tmp_path / f"finished {result}"))
    waiting, _ = executor.submit(wait_for_both), executor.submit(note, quick)
    executor.run()
    assert waiting.result()
    assert (tmp_path / "finished True").exists()
