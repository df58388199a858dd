"""The threads that help a kernel: a pool that a launch may use but never has to wait for.

An OpenMP region ends when every thread of its team has arrived, so on a busy machine one descheduled thread costs the
launch a whole time slice, even if all the work is long done. Here the launching thread claims work items like any
helper, and once there are none left it waits only for helpers that are in the middle of one. A helper that never woke
up costs nothing; with all of them gone (after a fork, say) launches still finish.

    pool record     generation   changes with each launch; helpers watch it
                    gate         OPEN bit | launches' joined count << 16 | helpers inside
                    busy         1 while some thread's launch owns the pool; others then run alone
                    sleepers     helpers waiting on the semaphore
                    job          function, arguments, most helpers
                    constants    stop flag; addresses of the C library's sem_wait, sem_post and sched_yield

Helpers enter only while the gate is open, and a launch replaces the job only when the gate is closed and nobody is
inside, so a late helper can never touch the arguments of a launch that has returned. Between launches helpers spin for
some tens of microseconds, the distance between the operators of one step, and then sleep.
"""

import atexit
import ctypes
import os
import platform
import threading
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from charonia_kernels.cpu._compile import compile_cached

_I64 = ir.IntType(64)
_WORD = 64  # bytes between fields: one cache line each
_GENERATION, _GATE, _BUSY, _SLEEPERS, _SEMAPHORE = (_WORD * i for i in range(5))
_JOB, _CONSTANTS = _WORD * 5, _WORD * 6
_FUNCTION, _ARGS, _HELPERS = (_JOB + 8 * i for i in range(3))
_STOP, _WAIT, _POST, _YIELD = (_CONSTANTS + 8 * i for i in range(4))
_RECORD_BYTES = _WORD * 7
_OPEN = 1 << 40
_JOINED = 1 << 16
_INSIDE_MASK = _JOINED - 1
_SPINS = 2000


@intrinsic
def _read(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _write(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    """Atomic add; returns the old value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _swap_if(typing_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Atomic compare-and-swap; returns whether it took place."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(target, args[1], args[2], "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _relax(typing_context: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() == "x86_64":
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, pause, "llvm.x86.sse2.pause"), [])
        elif platform.machine() == "aarch64":
            hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            function = cgutils.get_or_insert_function(builder.module, hint, "llvm.aarch64.hint")
            builder.call(function, [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typing_context: Any, function: Any, argument: Any) -> Any:
    """Call the C function ``int(void *)`` or ``void(void *)`` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        builder.call(
            builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], cgutils.voidptr_t)]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _help(pool: int) -> None:
    """Body of a helper thread, compiled: wait for a launch, join it, repeat until told to stop."""
    seen = _read(pool + _GENERATION)
    while _read(pool + _STOP) == 0:
        spins = 0
        while spins < _SPINS and _read(pool + _GENERATION) == seen:
            _relax()
            spins += 1
        if _read(pool + _GENERATION) == seen:
            _add(pool + _SLEEPERS, 1)
            registered = True
            if _read(pool + _GENERATION) != seen:
                # A launch came between: take the registration back, unless its wake-up is already on its way.
                waiting = _read(pool + _SLEEPERS)
                while waiting > 0 and registered:
                    if _swap_if(pool + _SLEEPERS, waiting, waiting - 1):
                        registered = False
                    else:
                        waiting = _read(pool + _SLEEPERS)
            if registered:
                _call(_read(pool + _WAIT), pool + _SEMAPHORE)
            continue
        seen = _read(pool + _GENERATION)
        gate = _read(pool + _GATE)
        while gate >= _OPEN and (gate - _OPEN) // _JOINED < _read(pool + _HELPERS):
            if _swap_if(pool + _GATE, gate, gate + _JOINED + 1):
                _call(_read(pool + _FUNCTION), _read(pool + _ARGS))
                _add(pool + _GATE, -1)
                break
            gate = _read(pool + _GATE)


def _launch(pool: int, function: int, args: int, helpers: int) -> None:
    """Run ``function(args)`` here and on up to ``helpers`` other threads, compiled; returns when all are out of it."""
    if not _swap_if(pool + _BUSY, 0, 1):
        _call(function, args)
        return
    _write(pool + _FUNCTION, function)
    _write(pool + _ARGS, args)
    _write(pool + _HELPERS, helpers)
    _write(pool + _GATE, _OPEN)
    _add(pool + _GENERATION, 1)
    wake = helpers
    while wake > 0:
        waiting = _read(pool + _SLEEPERS)
        if waiting <= 0:
            break
        if _swap_if(pool + _SLEEPERS, waiting, waiting - 1):
            _call(_read(pool + _POST), pool + _SEMAPHORE)
            wake -= 1
    _call(function, args)
    _add(pool + _GATE, -_OPEN)
    spins = 0
    while _read(pool + _GATE) & _INSIDE_MASK != 0:
        if spins < _SPINS:
            _relax()
        else:  # the helper may be waiting for this very core
            _call(_read(pool + _YIELD), 0)
        spins += 1
    _write(pool + _BUSY, 0)


class Pool:
    """Helper threads of this process, started on demand, and the way to launch on them."""

    def __init__(self) -> None:
        i64 = types.int64
        help_code = compile_cached(_help, types.void(i64))
        launch_code = compile_cached(_launch, types.void(i64, i64, i64, i64))
        self._keep_alive = (help_code, launch_code)
        # CFUNCTYPE releases the GIL for as long as the call lasts.
        self._help = ctypes.CFUNCTYPE(None, ctypes.c_int64)(help_code.address)
        self._launch = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(launch_code.address)
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self._stop)

    def _reset(self) -> None:
        """Start with no helpers; in a forked child, forget those of the parent."""
        libc = ctypes.CDLL(None)
        self._memory = ctypes.create_string_buffer(_RECORD_BYTES + _WORD)
        start = ctypes.addressof(self._memory)
        self._record = start + -start % _WORD
        self._semaphore = ctypes.c_void_p(self._record + _SEMAPHORE)
        self._post = libc.sem_post
        libc.sem_init(self._semaphore, 0, 0)
        for field, function in ((_WAIT, libc.sem_wait), (_POST, libc.sem_post), (_YIELD, libc.sched_yield)):
            self._field(field).value = ctypes.cast(function, ctypes.c_void_p).value or 0
        self._threads: list[threading.Thread] = []
        self._grow = threading.Lock()

    def _field(self, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._record + offset)

    def _stop(self) -> None:
        """Let every helper return before the interpreter takes their code away."""
        self._field(_STOP).value = 1
        self._field(_GENERATION).value += 1
        for _ in self._threads:
            self._post(self._semaphore)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def run(self, function: int, args: int, threads: int) -> None:
        """Call the compiled ``void(void *)`` at ``function`` here and on up to ``threads - 1`` helpers.

        Args:
            function: address of the entry function; it must claim its work atomically.
            args: address of its argument record.
            threads: most threads to use, this one included.
        """
        if len(self._threads) < threads - 1:
            self._start(threads - 1)
        self._launch(self._record, function, args, threads - 1)

    def _start(self, helpers: int) -> None:
        with self._grow:
            while len(self._threads) < helpers:
                name = f"charonia-kernels-{len(self._threads)}"
                thread = threading.Thread(target=self._help, args=(self._record,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
