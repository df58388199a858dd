"""Compile-and-launch layer of the CPU kernels.

A kernel is a C function ``void(Args *)`` that numba compiles once for each combination of element types. Its workers
claim work items from a shared counter, so the same function runs on one thread (a plain call) or on many: parallel
launches enter PyTorch's own OpenMP pool through ``GOMP_parallel``. One pool for both means that no second set of
threads spins against it, that nothing has to be configured, and that ``torch.set_num_threads`` governs the kernels too.

Machine code is cached on disk where numba finds a writable place, keyed by CPU and by the sources of this package;
where there is none, it is compiled anew in each process.
"""

import ctypes
import hashlib
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.core.errors import NumbaWarning

JIT_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy", "nogil": True}
# Not "fast": NaN and infinity keep their meaning.
FAST_MATH = {"reassoc", "contract", "nsz", "arcp", "afn"}

ELEMENT: dict[torch.dtype, Any] = {torch.float32: numba.float32, torch.bfloat16: numba.uint16}
"""Storage type of each supported dtype; numba has no bf16, so its bits travel as uint16."""


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """A helper that kernels call; compiled as part of them, with reassociating float arithmetic."""
    return numba.njit(fastmath=FAST_MATH, **JIT_OPTIONS)(function)  # type: ignore[no-any-return]


def strict_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """A helper whose float operations keep the order they are written in."""
    return numba.njit(fastmath={"contract", "nsz"}, **JIT_OPTIONS)(function)  # type: ignore[no-any-return]


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCE_DIGEST = _source_digest()
"""Part of every cache key: numba watches only the file of the entry function, not those of the helpers it calls."""


INT = ctypes.c_int64
FLOAT = ctypes.c_double
WORK: list[tuple[str, type]] = [("next_item", INT), ("next_worker", INT), ("num_items", INT)]
"""First fields of every argument record: counters that the workers share (both start at 0), and the end of the work."""


def _gomp_parallel() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that torch loaded, or None where that runtime has no GNU entry points."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_GOMP_PARALLEL = _gomp_parallel()
_COMPILE_LOCK = threading.Lock()


class Kernel:
    """One op's compiled variants.

    Args:
        args: the ctypes record that launches fill; its first fields are those of :data:`WORK`.
        build: given the element types of a variant (and any integer constants), returns the entry function, whose
            only argument is the record.
    """

    def __init__(self, args: type[ctypes.Structure], build: Callable[..., Callable[[Any], None]]) -> None:
        self._signature = numba.void(numba.types.CPointer(numba.from_dtype(np.dtype(args))))
        self._build = build
        self._variants: dict[tuple[Any, ...], tuple[int, Any, Any]] = {}

    def variant(self, *key: Any) -> tuple[int, Any, Any]:
        """Compile, or load, the variant of these element dtypes and constants: (address, inline call, keep-alive)."""
        found = self._variants.get(key)
        return self._compile(key) if found is None else found

    def _compile(self, key: tuple[Any, ...]) -> tuple[int, Any, Any]:
        with _COMPILE_LOCK:
            if key in self._variants:
                return self._variants[key]
            entry = self._build(*(ELEMENT[part] if isinstance(part, torch.dtype) else part for part in key))
            compiled = _compile_cached(entry, self._signature)
            # PYFUNCTYPE keeps the GIL: a call of a few microseconds must not queue for it afterwards.
            inline = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
            self._variants[key] = (compiled.address, inline, compiled)
            return self._variants[key]

    def launch(self, key: tuple[Any, ...], args: ctypes.Structure, threads: int) -> None:
        """Run the variant on ``threads`` threads; one runs inline, more enter torch's pool and release the GIL."""
        address, inline, _ = self._variants.get(key) or self._compile(key)
        if threads > 1 and _GOMP_PARALLEL is not None:
            _GOMP_PARALLEL(address, ctypes.addressof(args), threads, 0)
        else:
            inline(ctypes.addressof(args))


def _compile_cached(entry: Callable[[Any], None], signature: Any) -> Any:
    options = {"fastmath": FAST_MATH, "boundscheck": False, "error_model": "numpy"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        try:
            return numba.cfunc(signature, cache=True, **options)(entry)
        except (RuntimeError, OSError):  # no writable cache folder
            return numba.cfunc(signature, cache=False, **options)(entry)


# Waking and joining the pool takes a few microseconds: so many elementary operations must be there to share.
_INLINE_WORK = 16384


def workers_for(work: int, items: int) -> int:
    """Threads for ``work`` elementary operations in ``items`` pieces: one when sharing would not pay."""
    return 1 if work < _INLINE_WORK else min(items, torch.get_num_threads())
