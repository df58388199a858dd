"""Noticing that the server is about to end, which nothing in the stub tells."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from charonia.triton import health
from charonia.triton.health import DrainGuard, ServerExit


def test_a_listening_socket_that_closes_gives_the_exit_away() -> None:
    http, grpc = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(http.getsockname())
    watch = ServerExit(os.getpid())
    assert not watch.seen
    watch.arm()
    assert not watch.seen
    client.close()
    later = socket.create_server(("127.0.0.1", 0))
    later.close()
    assert not watch.seen
    http.close()
    assert watch.seen
    grpc.close()


def test_requests_that_come_before_the_server_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of `model_warmup` do."""
    monkeypatch.setattr(health, "_LOOK_PERIOD_S", 0.0)
    watch = ServerExit(os.getpid())
    watch.arm()
    with socket.create_server(("127.0.0.1", 0)):
        watch.arm()
        http = socket.create_server(("127.0.0.1", 0))
        watch.arm()
        watch.arm()
        assert not watch.seen
        http.close()
        assert watch.seen
        watch.arm()
        assert watch.seen


def test_a_reused_descriptor_does_not_hide_it() -> None:
    http = socket.create_server(("127.0.0.1", 0))
    watch = ServerExit(os.getpid())
    watch.arm()
    descriptor = http.fileno()
    http.close()
    again = socket.create_server(("127.0.0.1", 0))
    assert again.fileno() == descriptor
    assert watch.seen
    again.close()


def test_a_server_that_cannot_be_looked_at_is_taken_to_run(tmp_path: Path) -> None:
    watch = ServerExit(1, proc=tmp_path)
    watch.arm()
    assert not watch.seen
    assert watch.exit_timeout_s() == 30.0


@pytest.mark.parametrize(
    ("arguments", "exit_timeout_s", "drain_timeout_s"),
    [
        (["tritonserver", "--exit-timeout-secs=60", "--http-port=1"], 60.0, 55.0),
        (["tritonserver", "--exit-timeout-secs", "4"], 4.0, 2.0),
        (["tritonserver", "--http-port=1"], 30.0, 25.0),
        (["tritonserver", "--exit-timeout-secs=soon"], 30.0, 25.0),
        (["tritonserver", "--exit-timeout-secs"], 30.0, 25.0),
    ],
)
def test_requests_may_drain_within_the_exit_timeout(
    tmp_path: Path, arguments: list[str], exit_timeout_s: float, drain_timeout_s: float
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_text("\0".join(arguments) + "\0")
    watch = ServerExit(7, proc=tmp_path)
    assert watch.exit_timeout_s() == exit_timeout_s
    assert watch.drain_timeout_s() == drain_timeout_s


class Exit(ServerExit):
    exiting = False

    @property
    def seen(self) -> bool:
        return self.exiting


def test_the_guard_aborts_only_when_the_time_to_drain_is_over() -> None:
    aborted = threading.Event()
    server_exit = Exit(0)
    guard = DrainGuard(server_exit, 0.3, aborted.set)
    assert not guard.draining
    server_exit.exiting = True
    deadline = time.monotonic() + 5
    while not guard.draining and time.monotonic() < deadline:
        time.sleep(0.01)
    assert guard.draining
    assert not aborted.is_set()
    assert aborted.wait(5)
    guard.stop()


def test_a_guard_that_is_stopped_aborts_nothing() -> None:
    server_exit = Exit(0)
    server_exit.exiting = True
    guard = DrainGuard(server_exit, 30.0, lambda: pytest.fail("aborted"))
    guard.stop()
