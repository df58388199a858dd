"""Compile C-callable functions with numba, through its on-disk cache where there is a writable place for one."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.errors import NumbaWarning

# Not numba's "fast": NaN and infinity keep their meaning.
FAST_MATH = frozenset({"reassoc", "contract", "nsz", "arcp", "afn"})


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCE_DIGEST = _source_digest()
"""Read by every kernel's entry function, which makes it part of the cache key: numba itself watches only the
file of the function it caches, not those of the helpers compiled into it."""


def compile_cached(function: Callable[..., None], signature: Any) -> Any:
    """Compile ``function`` to a C callback of this numba signature, or load it from the cache.

    Cache entries are keyed by CPU, signature, bytecode and closure, and written atomically, so that processes
    may share them. Where no cache folder can be written, the function is compiled for this process alone.

    Returns:
        numba's callback object; its ``address`` is valid while the object lives.
    """
    options = {"fastmath": set(FAST_MATH), "boundscheck": False, "error_model": "numpy"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        try:
            return numba.cfunc(signature, cache=True, **options)(function)
        except (RuntimeError, OSError):
            return numba.cfunc(signature, cache=False, **options)(function)
