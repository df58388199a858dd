"""One run of a Triton server, from start to stop, with everything that belongs to it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.ports import PortUse, check_ports, connect_address, http_status
from charonia.entrypoints.processes import (
    LAUNCH_MARK,
    LaunchToken,
    kill_quietly,
    launch_folder,
    remove_launch,
    remove_leftovers,
)
from charonia.entrypoints.server_log import ServerLog
from charonia.entrypoints.spawn import spawn_tied
from charonia.entrypoints.triton_binary import find_server

_POLL_S = 0.1
_PROBE_TIMEOUT_S = 2.0
_EXIT_MARGIN_S = 3.0
"""What a server may take beyond its exit timeout (it unloads models after it) before it is killed."""
_LEAVE_S = 3.0
"""What stubs and the engine may take to leave by themselves once their server is gone."""


def _thread_pool_size() -> int:
    """Threads in which the server takes responses from the stubs: its own default of 32 is slower on few cores."""
    return max(2, min(32, len(os.sched_getaffinity(0))))


class TritonServer:
    """A tritonserver process over one model repository, and everything that belongs to it.

    Runs once: `start`, `wait_ready`, `stop`; a `with` block does all three and waits 60 s for readiness. The
    server leads a process group of its own and dies with this process (parent-death signal). Its stubs watch
    it and end once they let go of the interpreter lock; what outlives both is cleared away by the next start
    (see `processes`).

    Attributes:
        process: the server itself (the parent of the stubs); None before `start`.
        log: its log, standard output and error together.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        host: str = "127.0.0.1",
        extra_args: Sequence[str] = (),
        log_path: Path | None = None,
        exit_timeout_s: int = 30,
        server: str | Path | None = None,
    ) -> None:
        """Describe a run; nothing happens yet.

        Args:
            repository: folder of models, as Triton wants it.
            http_port: HTTP, all three on `host`.
            grpc_port: gRPC.
            metrics_port: Prometheus metrics.
            host: address to listen on; loopback unless the caller asks for more.
            extra_args: more arguments of tritonserver; they come last, so they win.
            log_path: file to append the log to; one that disappears with `stop` where None.
            exit_timeout_s: seconds that requests in flight get to finish once `stop` is called.
            server: the binary or its folder; found on PATH or in the wheel where None.
        """
        self.repository = repository
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        self.exit_timeout_s = exit_timeout_s
        self.process: subprocess.Popen[bytes] | None = None
        self._extra_args = list(extra_args)
        self._server = server
        self._token = LaunchToken.fresh()
        self._folder = launch_folder(self._token, "server")
        self.log = ServerLog(log_path or self._folder / "server.log")

    @property
    def shm_prefix(self) -> str:
        """Start of the names of its shared memory regions in /dev/shm."""
        return self._token.shm_prefix

    @property
    def http_url(self) -> str:
        """Where HTTP clients connect, `host:port`."""
        return connect_address(self.host, self.http_port)

    @property
    def grpc_url(self) -> str:
        """Where gRPC clients connect, `host:port`."""
        return connect_address(self.host, self.grpc_port)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus scrapes `/metrics`, `host:port`."""
        return connect_address(self.host, self.metrics_port)

    def start(self) -> None:
        """Start the server and return at once.

        Raises `LaunchError`: no server found, a port taken, this Python or its numpy unfit.
        """
        if self.process is not None:
            raise RuntimeError("a TritonServer runs once; make another")
        try:
            remove_leftovers()
            binary = find_server(self._server)
            check_ports(
                self.host,
                [
                    PortUse("HTTP", self.http_port, "--http-port"),
                    PortUse("gRPC", self.grpc_port, "--grpc-port"),
                    PortUse("metrics", self.metrics_port, "--metrics-port"),
                ],
            )
            self._folder.mkdir(mode=0o700)
            command = [str(binary.path), *self._arguments(), *binary.prepare(self._folder), *self._extra_args]
            environment = binary.environment(os.environ)
            environment[LAUNCH_MARK] = str(self._token)
            self.process = spawn_tied(command, environment, self.log.path)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _arguments(self) -> list[str]:
        # The server's HTTP and gRPC libraries want an IPv6 address marked, each in its own way.
        is_ipv6 = ":" in self.host
        http_host, grpc_host = (f"ipv6:{self.host}", f"[{self.host}]") if is_ipv6 else (self.host, self.host)
        return [
            f"--model-repository={self.repository}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,thread-pool-size={_thread_pool_size()}",
            f"--http-address={http_host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={grpc_host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={http_host}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={self.exit_timeout_s}",
        ]

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once every model is ready; raise `LaunchError` with the cause otherwise."""
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            self.check_running()
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the Triton server was not ready after {timeout_s:g} s", detail=self.log.tail()
                )
            time.sleep(_POLL_S)

    def is_ready(self) -> bool:
        """Whether the server answers that it and all its models are ready."""
        if self.process is None or self.process.poll() is not None:
            return False
        return http_status(self.host, self.http_port, "/v2/health/ready", timeout_s=_PROBE_TIMEOUT_S) == 200

    def check_running(self) -> None:
        """Raise `LaunchError` with the cause, as far as the log tells it, unless the server process runs."""
        if self.process is None:
            raise RuntimeError("start() comes first")
        status = self.process.poll()
        if status is not None:
            cause = self.log.cause()
            ended = f"the Triton server {describe_exit(status)}"
            raise LaunchError(f"{ended}: {cause}" if cause else ended, detail=self.log.tail())

    def request_stop(self) -> None:
        """Ask the server to drain and exit (SIGTERM), without waiting. Stubs are its to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Drain within the exit timeout, kill what is left, remove its files; safe to call again.

        The draining ends at once when `hurry` returns True: something more urgent, or nothing left to drain.
        """
        self.request_stop()
        deadline = time.monotonic() + self.exit_timeout_s + _EXIT_MARGIN_S
        while self.process is not None and self.process.poll() is None and time.monotonic() < deadline:
            if hurry():
                break
            time.sleep(_POLL_S)
        self._clear(grace_s=0.0 if hurry() else _LEAVE_S)

    def kill(self) -> None:
        """End everything at once: nothing drains. Safe to call again."""
        self._clear(grace_s=0.0)

    def _clear(self, *, grace_s: float) -> None:
        """End state: no process, shared memory or file of this run is left."""
        if self.process is not None:
            if self.process.poll() is None:
                # The group's number is the server's pid, and cannot pass to others while that is not reaped.
                kill_quietly(-self.process.pid, signal.SIGKILL)
                self.process.wait()
            remove_launch(self._token, grace_s=grace_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def describe_exit(status: int) -> str:
    """How a process ended, in words, from its `Popen.returncode`."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
