"""Process plumbing on Linux: pidfds, parent-death signals, the right interpreter."""

import ctypes
import os
import select
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK_BYTES = 1 << 20


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    fields = stat_fields(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third, the state, on (proc(5)); None if there is no such process."""
    try:
        # The name before the state may itself hold blanks and parentheses.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def parent_of(pid: int) -> int | None:
    """Pid of a process's parent; None if there is no such process."""
    fields = stat_fields(pid)
    return None if fields is None else int(fields[1])


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None if it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def wait_for_exit(pidfd: int, timeout_s: float) -> bool:
    """Whether the process behind a pidfd ends within the time."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0.0, timeout_s) * 1000))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once if its process has ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def return_large_blocks() -> None:
    """Have the C library return large blocks of memory to the system as soon as they are freed.

    Left alone, glibc raises its threshold for that as large blocks come and go, and a process that tokenises a huge
    prompt now and then ends up holding the worst of each thread. Other C libraries have no such knob.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK_BYTES)


def python_executable() -> str:
    """The interpreter of this environment; inside an embedding program `sys.executable` may be something else."""
    candidate = Path(sys.prefix) / "bin" / "python3"
    return str(candidate) if candidate.exists() else sys.executable
