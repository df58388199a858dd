"""Compiling many kernels at once, before the first of them has to run."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction


@contextmanager
def compile_only(num_threads: int) -> Iterator[None]:
    """Inside, a launch of a kernel only has it compiled, in one of `num_threads` threads; the end waits for all.

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
        with ThreadPoolExecutor(num_threads) as executor, AsyncCompileMode(executor):
            yield
    finally:
        JITFunction.run = run
