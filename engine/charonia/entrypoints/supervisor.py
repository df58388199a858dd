"""Keeps a server running: starts it, restarts it with back-off when a part of it dies, and stops it."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.triton_server import TritonServer
from charonia.entrypoints.watch import IdleWatch, ServerWatch, WatchLimits

_REACTION_S = 0.05


@dataclass(frozen=True)
class RestartPolicy:
    """At most `limit` restarts within `window_s`; the delay doubles with each, up to `max_delay_s`."""

    limit: int = 5
    window_s: float = 600.0
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0


class RestartBudget:
    """Counts restarts against a policy."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._restarts: deque[float] = deque()

    def spend(self, now: float) -> float | None:
        """Seconds to wait before the restart asked for at `now`, or None where the budget is exhausted."""
        while self._restarts and now - self._restarts[0] > self._policy.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._policy.limit:
            return None
        delay = self._policy.first_delay_s * 2.0 ** len(self._restarts)
        self._restarts.append(now)
        return min(float(delay), self._policy.max_delay_s)


@dataclass(frozen=True)
class Supervised:
    """What to supervise."""

    make_server: Callable[[], TritonServer]
    """Makes the server of each start, not started yet."""
    model_name: str
    instances: int
    runtime_dir: Path
    """Folder below which the model's engine keeps its status file."""


class StopRequest:
    """How a supervisor is told to stop: once to drain, twice to end at once.

    Fit for a signal handler, so without a lock: the handler may run while this thread holds it.
    """

    def __init__(self, debounce_s: float = 0.5) -> None:
        self.drain = False
        self.hurry = False
        self._debounce_s = debounce_s
        self._first = 0.0

    def ask(self) -> None:
        """Ask to stop. A second call within the debounce time counts for nothing.

        (A terminal and a parent such as `timeout` may both pass on one and the same Ctrl-C.)
        """
        now = time.monotonic()
        if not self.drain:
            self._first = now
            self.drain = True
        elif now - self._first >= self._debounce_s:
            self.hurry = True

    def wait(self, seconds: float) -> bool:
        """Sleep until asked to stop, at most so long; returns whether that was asked."""
        deadline = time.monotonic() + seconds
        while not self.drain and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _REACTION_S))
        return self.drain


class Supervisor:
    """Runs one server after another until asked to stop.

    ::

        start ──► ready ──► watch ──fault──► kill, clean up ──back-off──► start
                              │                                  └─ budget exhausted ──► LaunchError
                              └─asked to stop──► drain, clean up ──► return
    """

    def __init__(
        self,
        supervised: Supervised,
        stop: StopRequest,
        report: Callable[[str], None],
        *,
        ready_timeout_s: float = 600.0,
        limits: WatchLimits | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        """Describe what to keep running; nothing happens yet.

        Args:
            supervised: the server to run.
            stop: through which to end `run`.
            report: takes one line on each event that a user should know of.
            ready_timeout_s: how long a start may take.
            limits: how patient to be with a running server.
            policy: how often to restart.
        """
        self._supervised = supervised
        self._stop = stop
        self._report = report
        self._ready_timeout_s = ready_timeout_s
        self._limits = limits or WatchLimits()
        self._budget = RestartBudget(policy or RestartPolicy())

    def run(self, on_ready: Callable[[TritonServer], None], on_poll: Callable[[TritonServer], None]) -> None:
        """Serve until asked to stop; no process, port or shared memory is left afterwards, however it ends.

        Args:
            on_ready: called once, after the first start, with the server.
            on_poll: called several times a second while a server starts or runs.

        Raises:
            LaunchError: the first start failed, or too many restarts were needed.
        """
        has_served = False
        while not self._stop.drain:
            server = self._supervised.make_server()
            try:
                self._start(server, on_poll)
                if self._stop.drain:
                    return
                if has_served:
                    self._report("ready again")
                else:
                    on_ready(server)
                has_served = True
                fault = self._watch(server, on_poll)
                if fault is None:
                    self._report("stopping; requests in flight may finish; ask again to end them")
                    self._drain(server)
                    return
            except LaunchError as error:
                if not has_served:
                    raise
                fault = str(error)
            finally:
                server.kill()
            self._back_off(fault)

    def _start(self, server: TritonServer, on_poll: Callable[[TritonServer], None]) -> None:
        """Start the server and return once it is ready or a stop was asked for. Raises `LaunchError`."""
        server.start()
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._stop.drain and not server.is_ready():
            on_poll(server)
            server.check_running()
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the model was not ready after {self._ready_timeout_s:g} s", detail=server.log.tail()
                )
            self._stop.wait(0.1)

    def _watch(self, server: TritonServer, on_poll: Callable[[TritonServer], None]) -> str | None:
        """Return the fault that calls for a restart, or None once a stop was asked for."""
        supervised = self._supervised
        watch = ServerWatch(
            server,
            supervised.model_name,
            supervised.instances,
            supervised.runtime_dir,
            self._limits,
            self._report,
        )
        try:
            while not self._stop.wait(self._limits.poll_s):
                on_poll(server)
                if fault := watch.fault():
                    return fault
            return None
        finally:
            watch.close()

    def _drain(self, server: TritonServer) -> None:
        """Stop the server once nothing is in flight any more, or a second request to stop has come."""
        idle = IdleWatch(self._supervised.runtime_dir)
        server.stop(lambda: self._stop.hurry or idle.is_idle(time.monotonic()))

    def _back_off(self, fault: str) -> None:
        delay = self._budget.spend(time.monotonic())
        if delay is None:
            raise LaunchError(f"{fault}; giving up after too many restarts")
        self._report(f"{fault}; its processes and shared memory are cleared away; restarting in {delay:g} s")
        self._stop.wait(delay)
