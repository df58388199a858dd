"""Notices within seconds that a part of a running server has died or hangs: server, stubs, engine."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from charonia.entrypoints.ports import http_status
from charonia.entrypoints.processes import child_processes, command_line, exit_status, process_start_time
from charonia.entrypoints.triton_server import TritonServer, describe_exit
from charonia.serving.engine_home import EngineStatus

_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class WatchLimits:
    """How often to look and how long to be patient, in seconds."""

    poll_s: float = 0.5
    """Between looks at the processes."""
    probe_s: float = 2.0
    """Between HTTP probes, each of which may take as long again."""
    hung_s: float = 20.0
    """A server that has not answered a probe for so long hangs."""
    not_ready_s: float = 120.0
    """A server that answers, but has said "not ready" for so long, will not become ready by itself."""
    engine_missing_s: float = 60.0
    """An engine dead or without heartbeat for so long is not being restarted."""
    engine_beat_s: float = 10.0
    """An engine whose last heartbeat is older does not count as alive."""


class EngineWatch:
    """Follows the newest engine's status below a runtime folder. Frontends restart engines; this reports."""

    def __init__(self, runtime_dir: Path, limits: WatchLimits, report: Callable[[str], None]) -> None:
        self._runtime_dir = runtime_dir
        self._limits = limits
        self._report = report
        self._pid: int | None = None
        self._reported_dead: int | None = None
        self._last_alive = time.monotonic()

    def fault(self, now: float) -> str | None:
        """What only a restart of the server can mend, if anything. `now` is CLOCK_MONOTONIC, in seconds."""
        status = _newest_status(self._runtime_dir)
        # A model without an engine has no status, and one that drains is about to go.
        if status is None or status.state == "draining":
            self._last_alive = now
            return None
        if status.state == "failed":
            return f"the engine failed for good: {status.error or f'it died {status.restarts} times'}"
        running = process_start_time(status.pid) is not None
        self._note(status, running=running)
        if running and now - status.beat < self._limits.engine_beat_s:
            self._last_alive = now
        missing_s = now - self._last_alive
        if missing_s > self._limits.engine_missing_s:
            return f"there has been no live engine for {missing_s:.0f} s"
        return None

    def _note(self, status: EngineStatus, *, running: bool) -> None:
        """Report each death once, also of one that was replaced between two looks, and the recovery."""
        dead = self._pid if running and self._pid != status.pid else None if running else status.pid
        self._pid = status.pid
        if dead is not None and dead != self._reported_dead:
            self._report(f"the engine (process {dead}) died; its frontends start another")
            self._reported_dead = dead
        if running and status.state == "ready" and self._reported_dead is not None:
            self._report(f"the engine runs again, as process {status.pid} (restart {status.restarts})")
            self._reported_dead = None


class IdleWatch:
    """Tells when a model that is to stop has nothing left to do.

    Triton's HTTP server waits out its whole exit timeout for connections that clients keep open without using them, and
    a gRPC stream that is merely held open keeps it from unloading its models: its end says nothing about requests.
    """

    def __init__(self, runtime_dir: Path, idle_s: float = 4.0) -> None:
        """runtime_dir: as for `EngineWatch`. idle_s: how long nothing must have been asked of the engine."""
        self._runtime_dir = runtime_dir
        self._idle_s = idle_s
        self._busy_at = time.monotonic()

    def is_idle(self, now: float) -> bool:
        """Whether the engine lives and has had no request for so long. `now` is CLOCK_MONOTONIC, in seconds."""
        status = _newest_status(self._runtime_dir)
        # An engine that is gone, or is going, means that the server has come as far as to unload the model.
        if status is None or status.state != "ready" or status.num_requests:
            self._busy_at = now
            return False
        return status.beat - self._busy_at > self._idle_s


def _newest_status(runtime_dir: Path) -> EngineStatus | None:
    statuses = filter(None, map(_read_status, runtime_dir.glob("**/engine.json")))
    return max(statuses, key=lambda status: status.generation, default=None)


def _read_status(path: Path) -> EngineStatus | None:
    """The status; None where the file is gone or is no status."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineStatus)
    except (OSError, msgspec.MsgspecError):
        return None


class ReadyProbe:
    """Asks a server in a thread of its own, so that one that hangs delays nobody, whether it is ready."""

    def __init__(self, server: TritonServer, model_name: str, limits: WatchLimits) -> None:
        self._server = server
        self._paths = ("/v2/health/ready", f"/v2/models/{model_name}/ready")
        self._limits = limits
        self._answered = self._ready = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="charonia-ready-probe", daemon=True).start()

    def close(self) -> None:
        """Let the thread end after its probe."""
        self._closed.set()

    def fault(self, now: float) -> str | None:
        """Why the server must be restarted, as far as its answers tell, or None."""
        if now - self._answered > self._limits.hung_s:
            return f"the Triton server has not answered for {now - self._answered:.0f} s"
        if now - self._ready > self._limits.not_ready_s:
            return f"the Triton server has not been ready for {now - self._ready:.0f} s"
        return None

    def _run(self) -> None:
        while not self._closed.wait(self._limits.probe_s):
            statuses = [self._status(path) for path in self._paths]
            now = time.monotonic()
            if None not in statuses:
                self._answered = now
            if statuses == [200, 200]:
                self._ready = now

    def _status(self, path: str) -> int | None:
        return http_status(self._server.host, self._server.http_port, path, timeout_s=self._limits.probe_s)


class ServerWatch:
    """All that is watched of one running, ready server."""

    def __init__(
        self,
        server: TritonServer,
        model_name: str,
        instances: int,
        runtime_dir: Path,
        limits: WatchLimits,
        report: Callable[[str], None],
    ) -> None:
        """Begin to watch.

        Args:
            server: a server that is ready.
            model_name: its model.
            instances: how many stub processes the model must have.
            runtime_dir: the folder below which engines keep their status.
            limits: how patient to be.
            report: takes one line on each event that needs no restart.
        """
        self._server = server
        self._instances = instances
        self._probe = ReadyProbe(server, model_name, limits)
        self._engine = EngineWatch(runtime_dir, limits, report)
        self._stubs = self._find_stubs()

    def close(self) -> None:
        """Stop watching."""
        self._probe.close()

    def fault(self) -> str | None:
        """Why the server must be restarted now, or None while all is well. Takes well under a millisecond."""
        now = time.monotonic()
        return self._server_fault() or self._stub_fault() or self._engine.fault(now) or self._probe.fault(now)

    def _server_fault(self) -> str | None:
        process = self._server.process
        assert process is not None
        status = process.poll()
        if status is None:
            return None
        return f"the Triton server (process {process.pid}) {describe_exit(status)}"

    def _stub_fault(self) -> str | None:
        """The server neither restarts a dead stub nor says that it is not ready any more."""
        dead = [pid for pid, (started, _) in self._stubs.items() if process_start_time(pid) != started]
        if not dead and len(self._stubs) >= self._instances:
            return None
        ends = [_describe_stub_exit(pid, self._stubs[pid][1]) for pid in dead]
        self._stubs = self._find_stubs()  # a reload of the model replaces them
        if len(self._stubs) >= self._instances:
            return None
        return "; ".join([f"{len(self._stubs)} of {self._instances} model instances run", *ends])

    def _find_stubs(self) -> dict[int, tuple[int, str]]:
        """Stub processes by pid: start time and the name of the model instance."""
        assert self._server.process is not None
        stubs = {}
        for pid in child_processes(self._server.process.pid):
            arguments = command_line(pid)
            started = process_start_time(pid)
            if started is not None and arguments and Path(arguments[0]).name == _STUB:
                stubs[pid] = (started, arguments[-2])
        return stubs


def _describe_stub_exit(pid: int, instance: str) -> str:
    status = exit_status(pid)  # the server leaves its dead stubs unreaped
    return f"the stub of {instance} (process {pid}) {'is gone' if status is None else describe_exit(status)}"
