"""The engine's side of its socket, without an engine behind it: frontends that do not read, or say things twice."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from charonia.core.stats import EngineStats
from charonia.errors import ErrorCode
from charonia.request import EngineRequest, TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.serving import engine_process, wire
from charonia.serving.channel import Channel
from charonia.serving.engine_home import EngineDir, EngineStatus
from charonia.serving.engine_process import EngineServer
from charonia.serving.watchdog import Watchdog

TOKENS_A_STEP = 2_000


@dataclass
class EndlessCore:
    """Brings many tokens a step to every request, until it is aborted."""

    running: set[int] = field(default_factory=set)
    num_deltas: int = 0

    def add(self, request: EngineRequest) -> None:
        self.running.add(request.request_id)

    def abort(self, request_id: int, message: str = "", code: ErrorCode = ErrorCode.CANCELLED) -> None:
        self.running.discard(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[TokenDelta]:
        time.sleep(0.001)
        self.num_deltas += len(self.running)
        return [
            TokenDelta(request_id=request_id, token_ids=[100_000] * TOKENS_A_STEP)
            for request_id in self.running
        ]

    def stats(self) -> EngineStats:
        return EngineStats()

    def shutdown(self) -> None:
        pass


@pytest.fixture
def core() -> EndlessCore:
    return EndlessCore()


@pytest.fixture
def connect(core: EndlessCore) -> Iterator[Callable[[], Channel]]:
    """What connects to a running server."""
    with tempfile.TemporaryDirectory(prefix="chr-") as path:
        home = Path(path) / "r"
        home.mkdir(mode=0o700)
        (home / "1" / "members").mkdir(parents=True)
        directory = EngineDir(home / "1")
        directory.add_member("this", os.getpid())
        status = EngineStatus(pid=os.getpid(), state="ready", generation=1, beat=0.0)
        watchdog = Watchdog(directory, status, owner_pid=os.getppid(), step_timeout_s=60.0)
        server = EngineServer(core, directory, watchdog, os.getppid())  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run)
        thread.start()
        channels: list[Channel] = []

        def connect() -> Channel:
            channels.append(Channel.connect(directory.socket_path))
            return channels[-1]

        yield connect
        server.stop()
        thread.join(10)
        assert not thread.is_alive()
        for channel in channels:
            channel.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def frames(channel: Channel) -> list[wire.ToFrontend]:
    return [wire.decode_to_frontend(data) for data in channel.receive()]


def greet(channel: Channel) -> int:
    """Say hello; the index that the engine gives."""
    channel.send(wire.encode(wire.Hello(os.getpid())))
    welcomes: list[wire.Welcome] = []
    wait_until(lambda: welcomes.extend(f for f in frames(channel) if isinstance(f, wire.Welcome)) or welcomes)
    return welcomes[0].client_index


def submit(channel: Channel, request_id: int) -> None:
    request = EngineRequest(
        request_id=request_id, prompt_token_ids=[1], sampling=SamplingParams(), seed=0, max_tokens=9, arrival_time=0.0
    )  # fmt: skip
    channel.send(wire.encode(wire.Submit([request])))


def test_a_frontend_that_does_not_read_is_hung_up_on_and_its_neighbour_is_not(
    core: EndlessCore, connect: Callable[[], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "MAX_UNREAD_BYTES", 1_000_000)
    asleep, awake = connect(), connect()
    ids = [greet(channel) << wire.CLIENT_SHIFT for channel in (asleep, awake)]
    for channel, request_id in zip((asleep, awake), ids, strict=True):
        submit(channel, request_id)
    wait_until(lambda: core.running == set(ids))
    wait_until(lambda: frames(awake) and core.running == {ids[1]})
    wait_until(lambda: not asleep.receive() and asleep.closed)
    wait_until(lambda: frames(awake))
    awake.send(wire.encode(wire.Abort([ids[1]])))
    wait_until(lambda: frames(awake) is not None and not core.running)


def test_a_reader_that_lags_gets_every_frame(core: EndlessCore, connect: Callable[[], Channel]) -> None:
    channel = connect()
    request_id = greet(channel) << wire.CLIENT_SHIFT
    submit(channel, request_id)
    wait_until(lambda: core.running)
    time.sleep(0.5)
    channel.send(wire.encode(wire.Abort([request_id])))
    wait_until(lambda: not core.running)
    deltas: list[TokenDelta] = []
    wait_until(
        lambda: deltas.extend(d for f in frames(channel) for d in f.deltas) or len(deltas) >= core.num_deltas
    )
    assert len(deltas) == core.num_deltas > 20
    assert all(len(delta.token_ids) == TOKENS_A_STEP for delta in deltas)


def test_a_second_hello_is_ignored_and_a_goodbye_ends_all(
    core: EndlessCore, connect: Callable[[], Channel]
) -> None:
    channel = connect()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    index = greet(channel)
    for _ in range(20):
        channel.send(wire.encode(wire.Hello(os.getpid())))
    submit(channel, index << wire.CLIENT_SHIFT)
    wait_until(lambda: core.running)
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2
    channel.send(wire.encode(wire.Bye()))
    submit(channel, index << wire.CLIENT_SHIFT | 1)
    wait_until(lambda: not channel.receive() and channel.closed)
    assert not core.running
