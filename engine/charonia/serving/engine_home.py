"""Where the frontends of one model find its engine: a private directory, one numbered subdirectory per engine.

    <runtime_dir>/lock                      held while joining, leaving or starting an engine
    <runtime_dir>/<generation>/config.json  the engine's configuration
    <runtime_dir>/<generation>/engine.json  its status, rewritten about once a second
    <runtime_dir>/<generation>/engine.sock  its socket
    <runtime_dir>/<generation>/members/NAME pid of each frontend

Model reloads overlap: the new load's frontends arrive, under the same names, before the old ones leave. So a frontend
joins the newest engine that is not draining, has the same configuration and has no living member of its name;
otherwise it starts the next generation.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from charonia.config import EngineConfig
from charonia.errors import ConfigError
from charonia.serving.processes import is_alive, python_executable

EngineState = Literal["starting", "ready", "draining", "failed"]
MAX_SOCKET_PATH = 100
MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0
_ENGINE_MODULE = "charonia.serving.engine_process"


_SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="charonia-spawner")
"""Starts engine processes. Their parent-death signal is tied to the thread that starts them, so this one lives as
long as the process does, whatever becomes of the frontends' own threads."""


class EngineStatus(msgspec.Struct, kw_only=True):
    """engine.json. beat: CLOCK_MONOTONIC of the last sign of life. error, error_code: why the start failed.

    restarts: engines of this directory that died before this one, within the restart window. num_requests: those that
    run or wait, at most about a second ago.
    """

    pid: int
    state: EngineState
    generation: int
    beat: float
    restarts: int = 0
    num_requests: int = 0
    error: str | None = None
    error_code: str | None = None


class EngineDir:
    """One engine's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = int(path.name)

    @property
    def socket_path(self) -> Path:
        """Where the engine listens."""
        return self.path / "engine.sock"

    def read_config(self) -> EngineConfig:
        """The engine's configuration."""
        return msgspec.json.decode((self.path / "config.json").read_bytes(), type=EngineConfig)

    def read_status(self) -> EngineStatus | None:
        """The last status, None before there is one."""
        try:
            return msgspec.json.decode((self.path / "engine.json").read_bytes(), type=EngineStatus)
        except FileNotFoundError:
            return None

    def write_status(self, status: EngineStatus) -> None:
        """Replace the status atomically."""
        status.beat = time.monotonic()
        temporary = self.path / "engine.json.new"
        temporary.write_bytes(msgspec.json.encode(status))
        temporary.rename(self.path / "engine.json")

    def add_member(self, name: str, pid: int) -> None:
        """Record a frontend."""
        (self.path / "members" / name).write_text(str(pid))

    def remove_member(self, name: str, pid: int) -> None:
        """Forget a frontend, unless another process has taken its name."""
        if self._member_pid(name) == pid:
            (self.path / "members" / name).unlink(missing_ok=True)

    def living_members(self) -> dict[str, int]:
        """Pids of the frontends that still run, by name."""
        pids = {entry.name: self._member_pid(entry.name) for entry in (self.path / "members").iterdir()}
        return {name: pid for name, pid in pids.items() if pid is not None and is_alive(pid)}

    def _member_pid(self, name: str) -> int | None:
        try:
            return int((self.path / "members" / name).read_text())
        except (FileNotFoundError, ValueError):
            return None


class EngineHome:
    """The runtime directory of one model. Private to the user: raises `ConfigError` if it is anyone else's."""

    def __init__(self, runtime_dir: Path, engine_command: Sequence[str] = ()) -> None:
        """engine_command: starts an engine process, given its directory and owner; the engine's own by default."""
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = runtime_dir.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ConfigError(
                f"runtime directory {str(runtime_dir)!r} must be a directory of mode 0700 of this user"
            )
        if len(str(runtime_dir)) > MAX_SOCKET_PATH - len("/9999/engine.sock"):
            raise ConfigError(f"runtime directory {str(runtime_dir)!r} is too long for a unix socket path")
        self.path = runtime_dir
        self._engine_command = list(engine_command) or [python_executable(), "-m", _ENGINE_MODULE]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's lock; the kernel releases it if the process dies."""
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def join(self, config: EngineConfig, member: str, owner_pid: int) -> EngineDir:
        """The engine to attach to, with `member` recorded in it; starts one if there is none to join."""
        with self.locked():
            engines = self._engines()
            newest = engines[-1] if engines else None
            if newest is None or not self._joinable(newest, config, member):
                died = sum(self._died(engine) for engine in engines)
                newest = self._start(config, owner_pid, (newest.generation if newest else 0) + 1, died)
            newest.add_member(member, os.getpid())
            return newest

    def leave(self, engine: EngineDir, member: str, *, end_pid: int | None = None) -> bool:
        """Take a frontend out; True if it was the last, in which case process `end_pid` is told to end."""
        with self.locked():
            engine.remove_member(member, os.getpid())
            last = not engine.living_members()
            if last and end_pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(end_pid, signal.SIGTERM)
            return last

    def discard(self, engine: EngineDir) -> None:
        """Remove the directory of an engine that has ended as it should."""
        with self.locked():
            shutil.rmtree(engine.path, ignore_errors=True)

    def give_up(self, reason: str) -> None:
        """Tell observers that no engine will be started again."""
        with self.locked():
            newest = self._engines()[-1]
            status = newest.read_status()
            if status is not None:
                status.state, status.error = "failed", reason
                newest.write_status(status)

    def restarts_left(self) -> int:
        """Engines that may still die within the restart window before we give up."""
        return MAX_RESTARTS - sum(self._died(engine) for engine in self._engines())

    def _engines(self) -> list[EngineDir]:
        return sorted(
            (EngineDir(entry) for entry in self.path.iterdir() if entry.name.isdigit()),
            key=lambda e: e.generation,
        )

    def _joinable(self, engine: EngineDir, config: EngineConfig, member: str) -> bool:
        status = engine.read_status()
        return (
            status is not None
            and status.state in ("starting", "ready")
            and is_alive(status.pid)
            and engine.read_config() == config
            and member not in engine.living_members()
        )

    def _died(self, engine: EngineDir) -> bool:
        """Whether an engine ended without being asked to, lately."""
        status = engine.read_status()
        if status is None or status.state not in ("starting", "ready") or is_alive(status.pid):
            return False
        return time.monotonic() - status.beat < RESTART_WINDOW_S

    def _start(self, config: EngineConfig, owner_pid: int, generation: int, died: int) -> EngineDir:
        path = self.path / str(generation)
        shutil.rmtree(path, ignore_errors=True)
        (path / "members").mkdir(parents=True)
        (path / "config.json").write_bytes(msgspec.json.encode(config))
        process = _SPAWNER.submit(_spawn, self._engine_command, path, owner_pid).result()
        engine = EngineDir(path)
        # Whoever joins before the engine's own first word must find it alive.
        engine.write_status(
            EngineStatus(pid=process.pid, state="starting", generation=generation, beat=0.0, restarts=died)
        )
        return engine


def _spawn(command: list[str], path: Path, owner_pid: int) -> "subprocess.Popen[bytes]":
    arguments = [str(path), "--owner-pid", str(owner_pid)]
    # A session of its own: a Ctrl-C in the terminal is for the server, which then drains.
    return subprocess.Popen(command + arguments, stdin=subprocess.DEVNULL, start_new_session=True)
