"""Who owns what: names and marks everything of one launch, and clears away what a dead launcher left.

Shared memory regions, temporary folders and processes (server, stubs, engine, workers) of one launch all
carry its `LaunchToken`: as the start of their name, or in the environment variable `LAUNCH_MARK`, which child
processes inherit. The token names the launching process by pid and start time. So any later launch can tell
what is orphaned without a state file that could itself be stale, and cannot mistake what is foreign or alive.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from charonia.serving.processes import stat_fields

LAUNCH_MARK = "CHARONIA_LAUNCH"
"""Environment variable that marks the processes of a launch: written to be recognised by, never a setting."""

SHM_FOLDER = Path("/dev/shm")
_PROC = Path("/proc")
_TOKEN = re.compile(r"charonia_(\d+)_([0-9a-f]+)_(\d+)_([0-9a-f]+)_(\d+)(?=_|$)")
_MAX_TEMP_ROOT = 9  # characters; names of unix sockets, at most 107, must fit below a launch folder
_serials = itertools.count(1)


def process_start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), field 22), or None where it does not run.

    A zombie counts as not running.
    """
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def exit_status(pid: int) -> int | None:
    """`Popen.returncode` of a zombie: a signal's number is negative. None of any other process."""
    fields = stat_fields(pid)
    return os.waitstatus_to_exitcode(int(fields[49])) if fields is not None and fields[0] == "Z" else None


def child_processes(parent: int) -> list[int]:
    """Pids of the living children of `parent`."""
    children = []
    for pid in _pids():
        fields = stat_fields(pid)
        if fields is not None and fields[0] not in ("Z", "X") and int(fields[1]) == parent:
            children.append(pid)
    return children


def command_line(pid: int) -> list[str]:
    """Arguments of a process, argv[0] first; empty where it is gone, a zombie or not readable."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode("utf-8", "replace") for part in raw.split(b"\0")[:-1]]


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in os.scandir(_PROC) if entry.name.isdigit())


@dataclass(frozen=True)
class LaunchToken:
    """Identity of one launch: its launching process, and a serial number within that."""

    uid: int
    pid_namespace: int
    pid: int
    start_time: int
    serial: int

    def __str__(self) -> str:
        return f"charonia_{self.uid}_{self.pid_namespace:x}_{self.pid}_{self.start_time:x}_{self.serial}"

    @property
    def shm_prefix(self) -> str:
        """Start of the names of this launch's shared memory regions, and of no other's."""
        return f"{self}_"

    @classmethod
    def fresh(cls) -> "LaunchToken":
        """A token of this process that it has not used before."""
        pid = os.getpid()
        start_time = process_start_time(pid)
        if start_time is None:
            raise RuntimeError("/proc does not show this process; it must be mounted")
        return cls(os.geteuid(), _pid_namespace(), pid, start_time, next(_serials))

    @classmethod
    def parse(cls, name: str) -> "LaunchToken | None":
        """The token that `name` starts with, or None."""
        match = _TOKEN.match(name)
        if match is None:
            return None
        uid, namespace, pid, start_time, serial = match.groups()
        return cls(int(uid), int(namespace, 16), int(pid), int(start_time, 16), int(serial))

    def is_orphaned(self) -> bool:
        """Whether its launcher is known to be dead. Another user's or another container's launch never is."""
        if self.uid != os.geteuid() or self.pid_namespace != _pid_namespace():
            return False
        return process_start_time(self.pid) != self.start_time


def _pid_namespace() -> int:
    return (_PROC / "self" / "ns" / "pid").stat().st_ino


def one_for_four_cores() -> int:
    """A number of processes that leaves cores for those they work with: one for every four, from 1 to 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 4))


def launch_folder(token: LaunchToken, purpose: str) -> Path:
    """Path of a temporary folder that carries the token in its name; to be made with mode 0700."""
    return _temp_root() / f"{token}_{purpose}"


def _temp_root() -> Path:
    root = tempfile.gettempdir()
    return Path(root if len(root) <= _MAX_TEMP_ROOT else "/tmp")


def marked_processes(wanted: Callable[[LaunchToken], bool]) -> dict[int, LaunchToken]:
    """Living processes of this user, this one aside, whose launch mark `wanted` accepts, by pid."""
    found = {}
    for pid in _pids():
        token = None if pid == os.getpid() else _launch_mark(pid)
        if token is not None and wanted(token) and process_start_time(pid) is not None:
            found[pid] = token
    return found


def _launch_mark(pid: int) -> LaunchToken | None:
    """The launch a process belongs to, from its environment as it was started."""
    key = f"{LAUNCH_MARK}=".encode()
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return None
    for entry in environment.split(b"\0"):
        if entry.startswith(key):
            return LaunchToken.parse(entry[len(key) :].decode("utf-8", "replace"))
    return None


def remove_launch(token: LaunchToken, *, grace_s: float = 0.0) -> list[str]:
    """End what is left of one launch's processes and remove its shared memory.

    Args:
        token: the launch; its server process must have ended, or is ended here.
        grace_s: how long processes may take to leave by themselves before they are killed.

    Returns:
        One line per process that had to be killed.
    """
    return _remove(lambda other: other == token, grace_s=grace_s, folders=False)


def remove_leftovers() -> list[str]:
    """Clear away processes, shared memory and temporary folders of launches whose launcher is dead.

    Returns:
        One line per process killed.
    """
    return _remove(LaunchToken.is_orphaned, grace_s=0.0, folders=True)


def _remove(wanted: Callable[[LaunchToken], bool], *, grace_s: float, folders: bool) -> list[str]:
    deadline = time.monotonic() + grace_s
    while (found := marked_processes(wanted)) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = _kill_all(found, wanted)
    for region in _named(SHM_FOLDER, wanted):
        region.unlink(missing_ok=True)
    for folder in _named(_temp_root(), wanted) if folders else ():
        shutil.rmtree(folder, ignore_errors=True)
    return killed


def _kill_all(found: dict[int, LaunchToken], wanted: Callable[[LaunchToken], bool]) -> list[str]:
    """SIGKILL until none is left: a dying process may just have started another. Gives up after 5 s."""
    killed = []
    deadline = time.monotonic() + 5.0
    while found and time.monotonic() < deadline:
        for pid, token in found.items():
            line = " ".join(command_line(pid)[:2])
            # Ask again right before the signal: the pid may have passed to another process since the scan.
            if _launch_mark(pid) == token:
                kill_quietly(pid, signal.SIGKILL)
                killed.append(f"killed left-over process {pid} ({line})")
        time.sleep(0.05)
        found = marked_processes(wanted)
    return killed


def kill_quietly(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, or to the group `-pid`, that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _named(folder: Path, wanted: Callable[[LaunchToken], bool]) -> list[Path]:
    """Entries of `folder` that this user owns and whose name starts with a token that `wanted` accepts."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        token = LaunchToken.parse(entry.name)
        if token is None or not wanted(token):
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                found.append(Path(entry.path))
        except FileNotFoundError:
            continue
    return found
