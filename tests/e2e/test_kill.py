"""`charonia serve` with parts of it killed, stopped or hung while answers stream."""

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from charonia.entrypoints.processes import remove_leftovers
from charonia_client import CharoniaClient, CharoniaClientError
from support.launch import eventually, is_running, leftovers
from support.served import TINY_FLAGS, Served, serving

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

LONG = {"max_tokens": 7000, "ignore_eos": True, "temperature": 0.0}
TOLD_WITHIN_S = 5.0
HANG_NOTICED_WITHIN_S = 40.0
"""`MAX_MISSED_BEATS` checks a second apart, on a busy machine."""
BACK_WITHIN_S = 120.0
"""An idle machine takes a tenth of this."""

EXIT_TIMEOUT_S = 30


FLAGS = (*TINY_FLAGS, "--instances=2", f"--exit-timeout={EXIT_TIMEOUT_S}")


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """A service that every test brings down and that must have come back for the next."""
    with serving(tmp_path_factory.mktemp("phoenix"), str(tiny_model), *FLAGS) as served:
        yield served


@pytest.fixture
def mortal(tmp_path: Path, tiny_model: Path) -> Iterator[Served]:
    """A service that one test may end."""
    with serving(tmp_path, str(tiny_model), *FLAGS) as served:
        yield served


class LiveStream(threading.Thread):
    """A stream that is read as it comes, in a thread of its own. Ready once the first chunk is there."""

    def __init__(self, client: CharoniaClient, **options: object) -> None:
        super().__init__(daemon=True)
        self._stream = client.stream("Hello", **{**LONG, **options})  # type: ignore[arg-type]
        self.chunks = 0
        self.error: CharoniaClientError | None = None
        self.finish_reason: str | None = None
        self.ended_at = 0.0
        self._first: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.start()
        assert self._first.get(timeout=60)

    def run(self) -> None:
        try:
            for chunk in self._stream:
                self.chunks += 1
                self.finish_reason = chunk.finish_reason
                self._first.put(True)
        except CharoniaClientError as error:
            self.error = error
        self.ended_at = time.monotonic()
        self._first.put(False)


@contextlib.contextmanager
def live_streams(served: Served, per_protocol: int = 3) -> Iterator[list[LiveStream]]:
    """Streams over both protocols, through both instances; each has shown its first text."""
    urls = (served.grpc_url, served.http_url)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(CharoniaClient(url, requests_per_stream=1)) for url in urls]
        yield [LiveStream(client) for client in clients for _ in range(per_protocol)]


def assert_all_told(streams: list[LiveStream], since: float) -> None:
    for stream in streams:
        stream.join(max(0.0, since + TOLD_WITHIN_S - time.monotonic()))
    assert [stream.is_alive() for stream in streams] == [False] * len(streams)
    assert all(stream.error is not None for stream in streams)


def test_killed_engine(phoenix: Served) -> None:
    """Its frontends start another; the server and the stubs stay."""
    for number in (1, 2):
        before = phoenix.pids()
        with live_streams(phoenix) as streams:
            killed_at = time.monotonic()
            os.kill(before["engine"], signal.SIGKILL)
            assert_all_told(streams, killed_at)
        assert {type(stream.error).__name__ for stream in streams} == {"ModelNotReadyError"}
        assert phoenix.says(rf"engine \(process {before['engine']}\) died")
        assert phoenix.says(rf"engine runs again, as process \d+ \(restart {number}\)", BACK_WITHIN_S)
        assert eventually(phoenix.is_serving, BACK_WITHIN_S), phoenix.everything()
        after = phoenix.pids()
        assert after.pop("engine") != before.pop("engine") and after == before
        phoenix.wait_idle()


@pytest.mark.parametrize("part", ["stub 0", "server"])
def test_killed_stub_or_server(phoenix: Served, part: str) -> None:
    """Everything is cleared away and started anew."""
    before = phoenix.pids()
    with live_streams(phoenix) as streams:
        killed_at = time.monotonic()
        os.kill(before[part], signal.SIGKILL)
        assert_all_told(streams, killed_at)
    assert phoenix.says(rf"process {before[part]}\).* was ended by SIGKILL.*restarting in \d s")
    assert not any(map(is_running, before.values()))
    assert phoenix.says("ready again", BACK_WITHIN_S)
    assert phoenix.is_serving()
    assert not set(phoenix.pids().values()) & set(before.values())
    shared_memory = [name for name in leftovers(phoenix.process.pid) if name.startswith("/dev/shm")]
    assert len(shared_memory) <= len(before), shared_memory


def test_hung_engine(phoenix: Served) -> None:
    """Its frontends miss its beats for a quarter of a minute, and then end it and start another."""
    before = phoenix.pids()
    with live_streams(phoenix, 1) as streams:
        os.kill(before["engine"], signal.SIGSTOP)
        assert_all_told(streams, time.monotonic() + HANG_NOTICED_WITHIN_S)
    assert {type(stream.error).__name__ for stream in streams} == {"ModelNotReadyError"}
    assert eventually(phoenix.is_serving, BACK_WITHIN_S), phoenix.everything()
    after = phoenix.pids()
    assert not is_running(before.pop("engine")) and after.pop("engine")
    assert after == before


def test_stop_lets_streams_finish(mortal: Served) -> None:
    """However long their clients keep the connection afterwards."""
    launcher, ports = mortal.process.pid, (mortal.http_port, mortal.grpc_port, mortal.metrics_port)
    with CharoniaClient(mortal.grpc_url) as grpc, CharoniaClient(mortal.http_url) as http:
        streams = [LiveStream(client, max_tokens=400) for client in (grpc, http)]
        stopped_at = time.monotonic()
        mortal.process.terminate()
        assert mortal.process.wait(60) == 0
        # The clients keep their idle connections; the exit timeout is what waiting for these would take.
        assert time.monotonic() - stopped_at < EXIT_TIMEOUT_S
    for stream in streams:
        stream.join(5)
        assert (stream.error, stream.finish_reason) == (None, "length")
    assert leftovers(launcher) == []
    for port in ports:
        assert not is_listening(port)


def test_second_interrupt_ends_everything(mortal: Served) -> None:
    with live_streams(mortal) as streams:
        mortal.process.send_signal(signal.SIGINT)
        assert mortal.says("ask again to end them")
        time.sleep(0.6)  # sooner, it would pass for the same Ctrl-C
        assert all(stream.is_alive() for stream in streams)
        mortal.process.send_signal(signal.SIGINT)
        assert mortal.process.wait(10) == 0
        assert_all_told(streams, time.monotonic())
    assert leftovers(mortal.process.pid) == []


def test_killed_supervisor(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing goes on running, stubs that are sending included; the next start clears away the files."""
    served = Served(tmp_path, str(tiny_model), *FLAGS)
    served.wait_ready()
    pids = served.pids()
    with live_streams(served) as streams:
        killed_at = time.monotonic()
        served.process.kill()
        served.process.wait()
        assert_all_told(streams, killed_at)
    assert eventually(lambda: not any(map(is_running, pids.values())), TOLD_WITHIN_S)
    assert leftovers(served.process.pid) != []
    remove_leftovers()
    assert leftovers(served.process.pid) == []


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
