"""Compiling many kernels at once, before the first of them has to run.

Triton compiles under Python's lock, so threads gain little; processes share nothing but the kernel cache on disk, which
is all that they need to share. Kernels are compiled by forked children, whose results the parent then finds in the
cache. A child touches neither the GPU nor anything of the parent's.
"""

import hashlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Any

from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import driver
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

CHILDREN_TIMEOUT_S = 120.0
_HEAD_STARTS = 3
_NUMBER_BYTES = 2
"""Of a call's number in a pipe: written and read at once, so that no number is ever torn."""

Call = Callable[[], Any]
Calls = Sequence[tuple[Call, "Future[Any]"]]


class Effort(Enum):
    """What a call is expected to take.

    NONE: no child makes it. LONG: it comes before others, lest it is begun last; the first few have a child at once.
    """

    NONE = auto()
    SHORT = auto()
    LONG = auto()


class ForkingExecutor(Executor):
    """Collects calls; `run` makes them all, first in forked children and then here, where each finds what
    a child left on disk.

    A child that fails or takes too long costs nothing but its time: the call here does the work, and raises what there
    is to raise.
    """

    def __init__(self, num_processes: int, finish: Callable[[Any], object]) -> None:
        """`finish` is called in the children alone, with what each call returns."""
        self._num_processes = num_processes
        self._calls: list[tuple[Call, Future[Any]]] = []
        self._waiting: list[int] = []
        self._children = _Children(finish)
        self.effort = Effort.SHORT
        """Of what is submitted next."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As `Executor`, but nothing runs here before `run`."""
        future: Future[Any] = Future()
        number = len(self._calls)
        self._calls.append((lambda: fn(*args, **kwargs), future))
        if self.effort is Effort.LONG and len(self._children) < min(_HEAD_STARTS, self._num_processes - 1):
            self._children.fork(self._calls, [number])
        elif self.effort is Effort.LONG:
            self._waiting.insert(0, number)
        elif self.effort is Effort.SHORT:
            self._waiting.append(number)
        return future

    def run(self) -> None:
        """Make all calls; what they raise is in their futures. Once only.

        A call is made here as soon as a child is through with it, while the children go on with others.
        """
        left = dict(enumerate(self._calls))
        if self._num_processes > 1:
            more = min(self._num_processes, len(self._waiting))
            self._children.share_out(self._calls, self._waiting, more)
        for number in self._children.completed():
            _make(*left.pop(number))
        for call, future in left.values():
            _make(call, future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the children, whatever they are at. To be called in any case, as `with` does."""
        self._children.end()


def _make(call: Call, future: "Future[Any]") -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


class _Children:
    """Forked processes that make calls and tell, by number, which they have completed."""

    def __init__(self, finish: Callable[[Any], object]) -> None:
        self._finish = finish
        self._pids: list[int] = []
        self._done, self._tell = os.pipe()

    def __len__(self) -> int:
        return len(self._pids)

    def fork(self, calls: Calls, numbers: Iterable[int]) -> None:
        """A child that makes the calls of these numbers. Whatever happens, nothing of the parent's runs in it."""
        pid = os.fork()
        if pid > 0:
            self._pids.append(pid)
            return
        try:
            for number in numbers:
                try:
                    self._finish(calls[number][0]())
                except Exception:
                    continue  # the parent meets the error itself
                os.write(self._tell, number.to_bytes(_NUMBER_BYTES, "little"))
        finally:
            os._exit(0)

    def share_out(self, calls: Calls, numbers: Sequence[int], num_children: int) -> None:
        """Children that share the calls of these numbers, in this order: whoever is free has the next one."""
        todo, end = os.pipe()
        os.write(end, b"".join(number.to_bytes(_NUMBER_BYTES, "little") for number in numbers))
        os.close(end)
        for _ in range(num_children):
            self.fork(calls, _numbers(todo))
        os.close(todo)

    def completed(self) -> Iterator[int]:
        """Numbers of the calls as they are completed, until every child has ended or time is up. No fork after it."""
        os.close(self._tell)
        self._tell = -1
        deadline = time.monotonic() + CHILDREN_TIMEOUT_S
        while select.select([self._done], [], [], max(0.0, deadline - time.monotonic()))[0]:
            number = os.read(self._done, _NUMBER_BYTES)
            if not number:
                return
            yield int.from_bytes(number, "little")

    def end(self) -> None:
        """Kill and reap them all. One that has completed its calls has ended, or is about to."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()
        for end in (self._done, self._tell):
            if end >= 0:
                os.close(end)
        self._done = self._tell = -1


def _numbers(pipe: int) -> Iterator[int]:
    while number := os.read(pipe, _NUMBER_BYTES):
        yield int.from_bytes(number, "little")


def _build_launcher(kernel: CompiledKernel) -> None:
    """Up to Triton 3.6 a C compiler builds the launcher of every kernel at its first launch; that is cached too."""
    driver.active.launcher_cls(kernel.src, kernel.metadata)


class _CompileMode(AsyncCompileMode):  # type: ignore[misc]
    """Triton's mode of compiling later, which tells the executor what to expect of each kernel."""

    executor: ForkingExecutor

    def submit(self, key: str, compile_fn: Call, finalize_fn: Callable[[Any], object]) -> Any:
        if _is_cached(key):
            self.executor.effort = Effort.NONE
        return super().submit(key, compile_fn, finalize_fn)


def _is_cached(key: str) -> bool:
    """Whether the kernel is in the cache on disk. Should Triton come to keep it elsewhere, a needless child looks."""
    folder = getattr(get_cache_manager(hashlib.sha256(key.encode()).hexdigest()), "cache_dir", None)
    return folder is not None and any(Path(folder).glob("__grp__*"))


@contextmanager
def compile_only(num_processes: int) -> Iterator[None]:
    """Inside, a launch of a kernel only notes it; at the end all of them are compiled, in `num_processes` processes.

    So a dry run of the serving path compiles every kernel that it reaches, in parallel; what the kernels would have
    written stays as it was. For one thread at a time, before anything is served.

    Raises:
        Exception: whatever Triton raises for a kernel that does not compile.
    """
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # A kernel that specialises warps takes seconds, any other a fraction of one.
        executor.effort = Effort.LONG if isinstance(self, GluonJITFunction) else Effort.SHORT
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with ForkingExecutor(num_processes, _build_launcher) as executor:
        JITFunction.run = compile_instead
        try:
            with _CompileMode(executor):
                yield
                executor.run()
        finally:
            JITFunction.run = run
