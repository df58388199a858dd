"""Compiling many kernels at once, before the first of them has to run.

Triton compiles under Python's lock, so threads gain little; processes share nothing but the kernel cache on disk, which
is all that they need to share. Each kernel is compiled by a forked child, whose result the parent then finds in the
cache. A child touches neither the GPU nor anything of the parent's.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

CHILD_TIMEOUT_S = 120.0
_POLL_S = 0.005


class ForkingExecutor(Executor):
    """Runs each call in a forked child first and then here, where it finds what the child left on disk.

    A child that fails or takes too long costs nothing but its time: the call here does the work, and raises what there
    is to raise.
    """

    def __init__(self, num_processes: int) -> None:
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="charonia-compile")
        self._forking = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As `Executor`."""
        return self._threads.submit(self._run, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `Executor`."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # One fork at a time: no child inherits a lock that another fork holds.
        with self._forking:
            pid = os.fork()
            if pid == 0:
                _work_and_exit(fn, args, kwargs)
        _wait_for(pid)
        return fn(*args, **kwargs)


def _work_and_exit(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The child's life. Whatever happens, nothing of the parent's runs in it."""
    try:
        fn(*args, **kwargs)
    except BaseException:
        os._exit(1)  # the parent meets the error itself
    os._exit(0)


def _wait_for(pid: int) -> None:
    deadline = time.monotonic() + CHILD_TIMEOUT_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(_POLL_S)


@contextmanager
def compile_only(num_processes: int) -> Iterator[None]:
    """Inside, a launch of a kernel only has it compiled, in one of `num_processes` processes; the end waits for all.

    So a dry run of the serving path compiles every kernel that it reaches, in parallel; what the kernels would have
    written stays as it was. For one thread at a time, before anything is served.

    Raises:
        Exception: whatever Triton raises for a kernel that does not compile.
    """
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_instead
    try:
        with ForkingExecutor(num_processes) as executor, AsyncCompileMode(executor):
            yield
    finally:
        JITFunction.run = run
