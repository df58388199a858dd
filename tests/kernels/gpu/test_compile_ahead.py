"""Calls are made by children first, and then by the parent."""

import hashlib
import os
import time
from pathlib import Path

import pytest
import triton
from charonia_kernels.gpu import compile_ahead
from charonia_kernels.gpu.compile_ahead import Effort, ForkingExecutor
from support.launch import eventually
from triton.runtime.cache import get_cache_manager


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
        executor.effort = Effort.LONG
        long = executor.submit(note, tmp_path / "long")
        assert eventually((tmp_path / "finished").exists, 20.0) and not long.done()
        executor.effort = Effort.SHORT
        executor.submit(note, tmp_path / "short")
        executor.run()
    assert long.result() == os.getpid()
    assert len((tmp_path / "long").read_text().split()) == 2


def test_children_of_a_run_that_never_came_are_ended(tmp_path: Path) -> None:
    def stay() -> None:
        note(tmp_path / "pid")
        time.sleep(60)

    with ForkingExecutor(2, lambda _: None) as executor:
        executor.effort = Effort.LONG
        executor.submit(stay)
        assert eventually((tmp_path / "pid").exists, 20.0)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_child_makes_what_takes_no_effort(tmp_path: Path) -> None:
    with ForkingExecutor(3, lambda _: None) as executor:
        executor.effort = Effort.NONE
        futures = [executor.submit(note, tmp_path / "calls") for _ in range(5)]
        executor.run()
    assert [future.result() for future in futures] == [os.getpid()] * 5
    assert (tmp_path / "calls").read_text().split() == [str(os.getpid())] * 5


def test_long_calls_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, parent = tmp_path / "order", os.getpid()

    def begin(name: str) -> None:
        """Noted by children, of whom there are two: each stays with its first call until both have one."""
        if os.getpid() != parent:
            with order.open("a") as file:
                file.write(name + "\n")
            assert eventually(lambda: len(order.read_text().split()) >= 2, 20.0)

    monkeypatch.setattr(compile_ahead, "_HEAD_STARTS", 0)
    with ForkingExecutor(2, lambda _: None) as executor:
        for name, is_long in (("a", False), ("b", False), ("long", True)):
            executor.effort = Effort.LONG if is_long else Effort.SHORT
            executor.submit(begin, name)
        executor.run()
    assert "long" in order.read_text().split()[:2]


def test_what_the_cache_on_disk_holds_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    assert not compile_ahead._is_cached("a kernel")
    cache = get_cache_manager(hashlib.sha256(b"a kernel").hexdigest())
    cache.put_group("kernel.json", {"kernel.json": cache.put("{}", "kernel.json", binary=False)})
    assert compile_ahead._is_cached("a kernel")
    assert not compile_ahead._is_cached("another kernel")


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
