"""What every CPU kernel is made with: the jit decorators, the argument record, and the launch.

A kernel is a C function ``void(Args *)`` that numba compiles once for each combination of element types. Whoever runs
it claims work items from a counter in the record, so that the same function runs on one thread (a plain call) or on
several (through the pool), and the split of the work follows the threads that are really there.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch

from charonia_kernels.cpu._compile import FAST_MATH, SOURCE_DIGEST, compile_cached
from charonia_kernels.cpu._pool import Pool
from charonia_kernels.cpu._threads import num_threads

__all__ = [
    "ELEMENT",
    "FLOAT",
    "INT",
    "SOURCE_DIGEST",
    "WORK",
    "Kernel",
    "check_caches",
    "jit",
    "strict_jit",
    "workers_for",
]

ELEMENT: dict[torch.dtype, Any] = {torch.float32: numba.float32, torch.bfloat16: numba.uint16}
"""Storage type of each supported dtype; numba has no bf16, so its bits travel as uint16."""

INT = ctypes.c_int64
FLOAT = ctypes.c_double
WORK: list[tuple[str, type]] = [("next_item", INT), ("next_worker", INT), ("num_items", INT)]
"""First fields of every argument record: counters that the workers share (both start at 0), and the end of
the work."""

_JIT_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy", "nogil": True}
# Handing work to another thread takes a few microseconds: so many elementary operations must be there to share.
_INLINE_WORK = 16384


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """A helper that kernels call, compiled as part of them; sums may be reassociated."""
    return numba.njit(fastmath=set(FAST_MATH), **_JIT_OPTIONS)(function)  # type: ignore[no-any-return]


def strict_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`jit`, but float operations keep the order they are written in."""
    return numba.njit(fastmath={"contract", "nsz"}, **_JIT_OPTIONS)(function)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def pool() -> Pool:
    """The pool of this process."""
    return Pool()


def workers_for(work: int, items: int) -> int:
    """Threads for ``work`` elementary operations in ``items`` pieces: one when sharing would not pay."""
    return 1 if work < _INLINE_WORK else min(items, num_threads())


def check_caches(op: str, key_cache: torch.Tensor, value_cache: torch.Tensor, head_dim: int) -> None:
    """Refuse KV caches that are not ``[num_blocks, num_kv_heads, block_size, head_dim]`` with contiguous blocks.

    Raises:
        ValueError: naming the op and both caches.
    """
    same = value_cache.shape == key_cache.shape and value_cache.dtype == key_cache.dtype
    fits = same and key_cache.shape[3] == head_dim
    if fits and key_cache.is_contiguous() and value_cache.is_contiguous():
        return
    inner = (key_cache.shape[2] * head_dim, head_dim, 1)
    if not fits or key_cache.stride()[1:] != inner or value_cache.stride() != key_cache.stride():
        described = ", ".join(
            f"{list(cache.shape)} {cache.dtype} with strides {cache.stride()}"
            for cache in (key_cache, value_cache)
        )
        raise ValueError(
            f"{op}: the caches must be alike, of head size {head_dim}, each block contiguous; they are {described}"
        )


class _Variant:
    """One compiled entry function: its address for the pool, and a plain call."""

    def __init__(self, compiled: Any) -> None:
        self.keep_alive = compiled
        self.address: int = compiled.address
        # PYFUNCTYPE keeps the GIL: a call of a few microseconds must not queue for it afterwards.
        self.call = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


class Kernel:
    """One op's compiled variants.

    Args:
        args: the ctypes record that launches fill; its first fields are those of :data:`WORK`.
        build: given the element types of a variant (and any constants), returns the entry function, whose only
            argument is the record.
    """

    def __init__(self, args: type[ctypes.Structure], build: Callable[..., Callable[[Any], None]]) -> None:
        self._signature = numba.void(numba.types.CPointer(numba.from_dtype(np.dtype(args))))
        self._build = build
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        self._compiling = threading.Lock()

    def prepare(self, *key: Any) -> _Variant:
        """Compile, or load, the variant of these dtypes and constants, unless that is done."""
        with self._compiling:
            if key not in self._variants:
                parts = (ELEMENT[part] if isinstance(part, torch.dtype) else part for part in key)
                self._variants[key] = _Variant(compile_cached(self._build(*parts), self._signature))
            return self._variants[key]

    def launch(self, key: tuple[Any, ...], args: ctypes.Structure, threads: int) -> None:
        """Run a variant until its work is done, on this thread and up to ``threads - 1`` others."""
        variant = self._variants.get(key) or self.prepare(*key)
        if threads > 1:
            pool().run(variant.address, ctypes.addressof(args), threads)
        else:
            variant.call(ctypes.addressof(args))
