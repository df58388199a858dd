"""Calls are made by children first, and then by the parent."""

import os
import time
from pathlib import Path

import pytest
from charonia_kernels.gpu.compile_ahead import ForkingExecutor
from support.launch import eventually


def note(path: Path) -> int:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return os.getpid()


def test_each_call_is_made_by_a_child_and_by_the_parent(tmp_path: Path) -> None:
    with ForkingExecutor(3, lambda _: note(tmp_path / "finished")) as executor:
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

    with ForkingExecutor(2, lambda _: None) as executor:
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

    with ForkingExecutor(2, lambda _: None) as executor:
        bad, good = executor.submit(fail), executor.submit(note, tmp_path / "good")
        executor.run()
    with pytest.raises(RuntimeError, match="no such instruction"):
        bad.result()
    assert good.result() == os.getpid()
    assert len((tmp_path / "tries").read_text().split()) == 2


def test_long_calls_have_a_child_before_the_run(tmp_path: Path) -> None:
    with ForkingExecutor(4, lambda _: note(tmp_path / "finished")) as executor:
        executor.is_long = True
        long = executor.submit(note, tmp_path / "long")
        assert eventually((tmp_path / "finished").exists, 20.0) and not long.done()
        executor.is_long = False
        executor.submit(note, tmp_path / "short")
        executor.run()
    assert long.result() == os.getpid()
    assert len((tmp_path / "long").read_text().split()) == 2


def test_children_of_a_run_that_never_came_are_ended(tmp_path: Path) -> None:
    def stay() -> None:
        note(tmp_path / "pid")
        time.sleep(60)

    with ForkingExecutor(2, lambda _: None) as executor:
        executor.is_long = True
        executor.submit(stay)
        assert eventually((tmp_path / "pid").exists, 20.0)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_long_calls_come_first(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def add(name: str) -> None:
        with order.open("a") as file:
            file.write(name)

    with ForkingExecutor(2, lambda _: None) as executor:
        for name, is_long in (("with a child at once", True), ("a", False), ("b", True), ("c", False)):
            executor.is_long = is_long
            executor.submit(add, name if len(name) == 1 else "")
        executor.run()
    assert order.read_text().startswith("b")
    assert sorted(order.read_text()) == list("aabbcc")


def test_the_parent_follows_while_children_go_on(tmp_path: Path) -> None:
    quick = tmp_path / "quick"

    def wait_for_both() -> bool:
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            if quick.exists() and len(quick.read_text().split()) == 2:
                return True
            time.sleep(0.01)
        return False

    with ForkingExecutor(2, lambda result: note(tmp_path / f"finished {result}")) as executor:
        waiting, _ = executor.submit(wait_for_both), executor.submit(note, quick)
        executor.run()
    assert waiting.result()
    assert (tmp_path / "finished True").exists()
