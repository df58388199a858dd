"""Compiling many kernels at once, before the first of them has to run.

Triton compiles under Python's lock, so threads gain little; processes share nothing but the kernel cache on disk, which
is all that they need to share. Kernels are compiled by forked children, whose results the parent then finds in the
cache. A child touches neither the GPU nor anything of the parent's.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import driver
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

CHILDREN_TIMEOUT_S = 120.0
_NUMBER_BYTES = 2
"""Of a call's number in a pipe: written and read at once, so that no number is ever torn."""

Call = Callable[[], Any]


class ForkingExecutor(Executor):
    """Collects calls; `run` makes them all, first in forked children and then here, where each finds what
    a child left on disk.

    A child that fails or takes too long costs nothing but its time: the call here does the work, and raises what there
    is to raise.
    """

    def __init__(self, num_processes: int, finish: Callable[[Any], object]) -> None:
        """`finish` is called in the children alone, with what each call returns."""
        self._num_processes = num_processes
        self._finish = finish
        self._calls: list[tuple[Call, Future[Any]]] = []
        self.is_long = False
        """Whether what is submitted next takes long. Such calls come first, lest one of them is begun last."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As `Executor`, but nothing runs before `run`."""
        future: Future[Any] = Future()
        call = (lambda: fn(*args, **kwargs), future)
        if self.is_long:
            self._calls.insert(0, call)
        else:
            self._calls.append(call)
        return future

    def run(self) -> None:
        """Make all calls; what they raise is in their futures.

        A call is made here as soon as a child is through with it, while the children go on with others.
        """
        calls, self._calls = self._calls, []
        left = dict(enumerate(calls))
        num_children = min(self._num_processes, len(calls))
        if num_children > 1:
            with _Children([call for call, _ in calls], num_children, self._finish) as children:
                for number in children.completed():
                    _make(*left.pop(number))
        for call, future in left.values():
            _make(call, future)


def _make(call: Call, future: "Future[Any]") -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


class _Children:
    """Forked processes that share out calls among them: whoever is free has the next one."""

    def __init__(self, calls: Sequence[Call], num_children: int, finish: Callable[[Any], object]) -> None:
        todo, end = os.pipe()
        os.write(end, b"".join(i.to_bytes(_NUMBER_BYTES, "little") for i in range(len(calls))))
        os.close(end)
        self._done, done = os.pipe()
        self._pids = [_fork(calls, todo, done, finish) for _ in range(num_children)]
        os.close(todo)
        os.close(done)

    def __enter__(self) -> "_Children":
        return self

    def completed(self) -> Iterator[int]:
        """Numbers of the calls as they are completed, until every child has ended or time is up."""
        deadline = time.monotonic() + CHILDREN_TIMEOUT_S
        while select.select([self._done], [], [], max(0.0, deadline - time.monotonic()))[0]:
            number = os.read(self._done, _NUMBER_BYTES)
            if not number:
                return
            yield int.from_bytes(number, "little")

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._done)
        for pid in self._pids:
            # One that has completed its calls has ended, or is about to: its status is of no interest.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(calls: Sequence[Call], todo: int, done: int, finish: Callable[[Any], object]) -> int:
    """A child that makes calls until none is left. Whatever happens, nothing of the parent's runs in it."""
    pid = os.fork()
    if pid > 0:
        return pid
    try:
        while number := os.read(todo, _NUMBER_BYTES):
            try:
                finish(calls[int.from_bytes(number, "little")]())
            except Exception:
                continue  # the parent meets the error itself
            os.write(done, number)
    finally:
        os._exit(0)


def _build_launcher(kernel: CompiledKernel) -> None:
    """Up to Triton 3.6 a C compiler builds the launcher of every kernel at its first launch; that is cached too."""
    driver.active.launcher_cls(kernel.src, kernel.metadata)


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
        executor.is_long = isinstance(self, GluonJITFunction)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    executor = ForkingExecutor(num_processes, _build_launcher)
    JITFunction.run = compile_instead
    try:
        with AsyncCompileMode(executor):
            yield
            executor.run()
    finally:
        JITFunction.run = run
