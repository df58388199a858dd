"""The supervisor's decisions: when to restart, when to give up, what to report. No server runs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.supervisor import RestartBudget, RestartPolicy, StopRequest, Supervised, Supervisor
from charonia.entrypoints.watch import EngineWatch, IdleWatch, ReadyProbe, WatchLimits
from charonia.serving.engine_home import EngineStatus
from support.launch import eventually


class FakeServer:
    """A server without a process, for the supervisor's decisions."""

    host, http_port = "127.0.0.1", 1

    def __init__(self, log: list[str], *, fails: str = "") -> None:
        self.log = SimpleNamespace(tail=lambda: "", cause=lambda: None)
        self.process = SimpleNamespace(pid=os.getpid(), poll=lambda: self.status)
        self.status: int | None = None
        self._events, self._fails = log, fails

    def start(self) -> None:
        self._events.append("start")

    def is_ready(self) -> bool:
        return not self._fails

    def check_running(self) -> None:
        if self._fails:
            raise LaunchError(self._fails)

    def stop(self, hurry: Callable[[], bool]) -> None:
        self._events.append("hurried stop" if hurry() else "stop")

    def kill(self) -> None:
        self._events.append("kill")


class TestSupervisor:
    def make(
        self, tmp_path: Path, servers: list[FakeServer], **settings: Any
    ) -> tuple[Supervisor, StopRequest]:
        stop = StopRequest(debounce_s=0.05)
        self.reports: list[str] = []
        remaining = iter(servers)
        supervised = Supervised(lambda: next(remaining), "llm", 0, tmp_path)  # type: ignore[arg-type, return-value]
        settings.setdefault("policy", RestartPolicy(limit=2, first_delay_s=0.01))
        limits = WatchLimits(poll_s=0.02)
        return Supervisor(supervised, stop, self.reports.append, limits=limits, **settings), stop

    def test_stop_drains(self, tmp_path: Path) -> None:
        events: list[str] = []
        supervisor, stop = self.make(tmp_path, [FakeServer(events)])
        supervisor.run(lambda server: stop.ask(), lambda server: None)
        assert events == ["start", "stop", "kill"]

    def test_restarts_until_the_budget_is_spent(self, tmp_path: Path) -> None:
        events: list[str] = []
        servers = [FakeServer(events) for _ in range(3)]
        supervisor, _ = self.make(tmp_path, servers)

        def die(server: Any) -> None:
            server.status = -11

        with pytest.raises(LaunchError, match=r"was ended by SIGSEGV; giving up after too many restarts"):
            supervisor.run(lambda server: None, die)
        assert events == ["start", "kill"] * 3
        assert self.reports.count("ready again") == 2
        assert sum("restarting in" in report for report in self.reports) == 2

    def test_first_start_is_not_retried_and_a_later_one_is(self, tmp_path: Path) -> None:
        events: list[str] = []
        supervisor, _ = self.make(tmp_path, [FakeServer(events, fails="no weights")])
        with pytest.raises(LaunchError, match=r"^no weights$"):
            supervisor.run(lambda server: None, lambda server: None)
        assert events == ["start", "kill"]
        servers = [FakeServer(events), FakeServer(events, fails="port taken"), FakeServer(events)]
        servers[0].status = 1
        supervisor, stop = self.make(tmp_path, servers)
        supervisor.run(
            lambda server: None,
            lambda server: stop.ask() if server is servers[2] else None,  # type: ignore[comparison-overlap]
        )
        assert any("port taken; " in report for report in self.reports)

    def test_start_takes_too_long(self, tmp_path: Path) -> None:
        slow = FakeServer([])
        slow.is_ready = lambda: False  # type: ignore[method-assign]
        supervisor, _ = self.make(tmp_path, [slow], ready_timeout_s=0.1)
        with pytest.raises(LaunchError, match=r"not ready after 0.1 s"):
            supervisor.run(lambda server: None, lambda server: None)

    def test_budget(self) -> None:
        budget = RestartBudget(RestartPolicy(limit=3, window_s=100, first_delay_s=1, max_delay_s=3))
        assert [budget.spend(now) for now in (0, 1, 2, 3)] == [1, 2, 3, None]
        assert budget.spend(101.5) == 2  # those at 0 and 1 have left the window

    def test_second_request_to_stop_is_debounced(self) -> None:
        stop = StopRequest(debounce_s=0.05)
        assert not stop.wait(0.01)
        stop.ask()
        stop.ask()
        assert stop.wait(10)
        assert not stop.hurry
        time.sleep(0.06)
        stop.ask()
        assert stop.hurry


def test_idle_watch(tmp_path: Path) -> None:
    def write(beat: float, num_requests: int, state: Any = "ready") -> None:
        status = EngineStatus(pid=1, state=state, generation=1, beat=beat, num_requests=num_requests)
        (tmp_path / "engine.json").write_bytes(msgspec.json.encode(status))

    watch, now = IdleWatch(tmp_path, idle_s=4), time.monotonic()
    assert not watch.is_idle(now), "there is no engine"
    write(now, 1)
    assert not watch.is_idle(now)
    write(now + 3, 0)
    assert not watch.is_idle(now + 60), "the engine has not beaten since"
    write(now + 5, 0)
    assert watch.is_idle(now + 5)
    write(now + 6, 0, "draining")
    assert not watch.is_idle(now + 6), "it leaves by itself"
    write(now + 9, 0)
    assert not watch.is_idle(now + 9)


class TestEngineWatch:
    def make(self, tmp_path: Path) -> EngineWatch:
        self.reports: list[str] = []
        return EngineWatch(tmp_path, WatchLimits(engine_missing_s=60, engine_beat_s=10), self.reports.append)

    def write(self, folder: Path, pid: int, beat: float, state: Any = "ready", generation: int = 1) -> None:
        folder.mkdir(exist_ok=True)
        status = EngineStatus(pid=pid, state=state, generation=generation, beat=beat, restarts=generation - 1)
        (folder / "engine.json").write_bytes(msgspec.json.encode(status))

    def test_models_without_engine(self, tmp_path: Path) -> None:
        watch = self.make(tmp_path)
        (tmp_path / "engine.json").write_text("{half")
        assert watch.fault(time.monotonic() + 1000) is None
        assert self.reports == []

    def test_failed(self, tmp_path: Path) -> None:
        self.write(tmp_path / "1", os.getpid(), 0.0, "failed")
        assert "failed for good" in str(self.make(tmp_path).fault(time.monotonic()))

    def test_hung_engine_is_missed_after_a_minute(self, tmp_path: Path) -> None:
        watch, now = self.make(tmp_path), time.monotonic()
        self.write(tmp_path / "1", os.getpid(), now)
        assert [watch.fault(now + later) for later in (0, 9, 30, 68)] == [None] * 4
        assert "no live engine for 70 s" in str(watch.fault(now + 79))

    def test_replacement_between_two_looks_is_reported_once(self, tmp_path: Path) -> None:
        watch, now = self.make(tmp_path), time.monotonic()
        old = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.write(tmp_path / "1", old.pid, now)
        assert watch.fault(now) is None
        old.kill()
        old.wait()
        self.write(tmp_path / "2", os.getpid(), now, "starting", generation=2)
        assert watch.fault(now) is None
        self.write(tmp_path / "2", os.getpid(), now, "ready", generation=2)
        assert watch.fault(now) is watch.fault(now) is None
        assert self.reports == [
            f"the engine (process {old.pid}) died; its frontends start another",
            f"the engine runs again, as process {os.getpid()} (restart 1)",
        ]

    def test_death_is_reported_once(self, tmp_path: Path) -> None:
        watch, now = self.make(tmp_path), time.monotonic()
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        self.write(tmp_path / "1", child.pid, now)
        assert watch.fault(now) is watch.fault(now) is None
        assert self.reports == [f"the engine (process {child.pid}) died; its frontends start another"]


class TestReadyProbe:
    @pytest.mark.parametrize(
        ("status", "after_s", "fault"),
        [(None, 31, "has not answered"), (400, 21, "has not been ready"), (200, 21, None)],
    )
    def test_fault(self, status: int | None, after_s: float, fault: str | None) -> None:
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                if status is None:
                    time.sleep(0.5)  # longer than the probe waits
                    return
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=httpd.serve_forever, daemon=True).start()
        server: Any = SimpleNamespace(host="127.0.0.1", http_port=httpd.server_address[1])
        probe = ReadyProbe(server, "llm", WatchLimits(probe_s=0.3, hung_s=30, not_ready_s=20))
        later = time.monotonic() + after_s
        try:
            assert probe.fault(later) is not None
            assert eventually(lambda: len(asked) >= 4)
            assert set(asked) == {"/v2/health/ready", "/v2/models/llm/ready"}
            if fault is None:
                assert eventually(lambda: probe.fault(later) is None)
            else:
                assert fault in str(probe.fault(later))
        finally:
            probe.close()
            httpd.shutdown()
            httpd.server_close()
