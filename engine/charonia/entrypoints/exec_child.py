"""Become another program that dies with its launcher: ``python -I -S exec_child.py LAUNCHER PROGRAM ARG...``.

LAUNCHER is a pid. Run as a script in the new process, so that no Python code runs between fork and exec of
the launcher, which may have threads. The kernel ties the parent-death signal to the *thread* that started
this process.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Replace this process by ``arguments[1:]``; returns only where the launcher is gone already."""
    launcher = int(arguments[0])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != launcher:  # it died before the signal was armed
        sys.exit("the launcher is gone")
    # Python ignores these; programs expect the defaults, and exec would pass the ignoring on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
