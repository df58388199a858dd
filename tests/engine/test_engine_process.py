"""The engine process and its frontends: sharing, dying, restarting, leaving."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from charonia.config import EngineConfig
from charonia.errors import CharoniaError, ConfigError, EngineDeadError, InvalidRequestError, ModelLoadError
from charonia.outputs import RequestOutput
from charonia.sampling_params import SamplingParams
from charonia.serving.async_engine import AsyncEngine
from charonia.serving.channel import Channel
from charonia.serving.engine_home import EngineDir, EngineHome
from charonia.serving.processes import is_alive
from charonia.serving.request import ChatInput, GenerationRequest
from support.engines import tiny_model_dir

LONG = SamplingParams(temperature=0.0, max_tokens=7000, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(model_dir: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model_dir), load_format="dummy", dtype="float32", max_num_seqs=8, cpu_threads=1
    )


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A short path (unix sockets), and a check that no engine of it is left."""
    with tempfile.TemporaryDirectory(prefix="chr-") as path:
        home = Path(path) / "r"
        yield home
        pids = [status.pid for d in home.glob("[0-9]*") if (status := EngineDir(d).read_status()) is not None]
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 10.0)


@pytest.fixture(scope="module")
def engine_and_dir(config: EngineConfig) -> Iterator[tuple[AsyncEngine, Path]]:
    """One engine for all tests that leave it alive; afterwards it must be gone."""
    with tempfile.TemporaryDirectory(prefix="chr-") as path:
        runtime_dir = Path(path) / "r"
        engine = AsyncEngine.attach(config, runtime_dir=runtime_dir)
        pid = engine_pid(runtime_dir)
        yield engine, runtime_dir
        assert engine_pid(runtime_dir) == pid, "the engine died on the way"
        engine.shutdown(1.0)
        assert not is_alive(pid)
        assert not list(runtime_dir.glob("*/engine.sock"))


@pytest.fixture
def shared(engine_and_dir: tuple[AsyncEngine, Path]) -> Iterator[AsyncEngine]:
    """The common engine; each test must leave it empty."""
    engine = engine_and_dir[0]
    yield engine
    wait_until(lambda: engine.stats().kv_blocks_used == engine.stats().num_waiting == 0)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


def engine_pid(runtime_dir: Path) -> int:
    newest = max(runtime_dir.glob("[0-9]*"), key=lambda path: int(path.name))
    status = EngineDir(newest).read_status()
    assert status is not None
    return status.pid


class Collector:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.errors: list[CharoniaError] = []

    def on_output(self, output: RequestOutput) -> None:
        assert not self.ended, "nothing follows the end"
        self.outputs.append(output)

    def on_error(self, error: CharoniaError) -> None:
        assert not self.ended, "nothing follows the end"
        self.errors.append(error)

    @property
    def ended(self) -> bool:
        return bool(self.errors) or bool(self.outputs and self.outputs[-1].finished)

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.outputs[0].token_ids]


def run(engine: AsyncEngine, prompt: str = "Hello", params: SamplingParams = SHORT) -> list[int]:
    sink = Collector()
    engine.submit(GenerationRequest(prompt=prompt, params=params), sink)
    wait_until(lambda: sink.ended)
    assert not sink.errors
    return sink.token_ids


def test_streams(shared: AsyncEngine) -> None:
    engine = shared

    async def stream() -> list[RequestOutput]:
        return [output async for output in engine.generate(GenerationRequest(prompt="Hello", params=SHORT))]

    outputs = asyncio.run(stream())
    assert outputs[-1].finished and sum(len(output.outputs[0].token_ids) for output in outputs) == 8
    assert outputs[0].timings.first_token > 0


def test_leaving_a_stream_aborts_it(shared: AsyncEngine) -> None:
    engine = shared
    aborts = engine.stats().requests_finished.get("abort", 0)

    async def leave() -> None:
        stream = engine.generate(GenerationRequest(prompt="Hello", params=LONG))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    wait_until(lambda: engine.stats().requests_finished.get("abort") == aborts + 1)


def test_frontends_share_one_engine(config: EngineConfig, runtime_dir: Path) -> None:
    first = AsyncEngine.attach(config, runtime_dir=runtime_dir, member="llm_0_0")
    second = AsyncEngine.attach(config, runtime_dir=runtime_dir, member="llm_0_1")
    pid = engine_pid(runtime_dir)
    assert len(list(runtime_dir.glob("[0-9]*"))) == 1
    sinks = [Collector() for _ in range(8)]
    for i, sink in enumerate(sinks):
        (first, second)[i % 2].submit(GenerationRequest(prompt=f"number {i // 2}", params=SHORT), sink)
    wait_until(lambda: all(sink.ended for sink in sinks))
    for i in range(0, 8, 2):
        assert sinks[i].token_ids == sinks[i + 1].token_ids
    first.shutdown()
    assert is_alive(pid) and run(second)
    second.shutdown()
    assert not is_alive(pid)


def test_a_second_load_gets_its_own_engine(config: EngineConfig, runtime_dir: Path) -> None:
    old = AsyncEngine.attach(config, runtime_dir=runtime_dir, member="llm_0_0")
    old_pid = engine_pid(runtime_dir)
    new = AsyncEngine.attach(config, runtime_dir=runtime_dir, member="llm_0_0")
    assert engine_pid(runtime_dir) != old_pid
    old.shutdown()
    assert not is_alive(old_pid) and run(new)
    new.shutdown()


def test_engine_death_ends_requests_and_brings_another(config: EngineConfig, runtime_dir: Path) -> None:
    engine = AsyncEngine.attach(config, runtime_dir=runtime_dir)
    expected = run(engine)
    sinks = [Collector() for _ in range(3)]
    for sink in sinks:
        engine.submit(GenerationRequest(prompt="Hello", params=LONG), sink)
    wait_until(lambda: all(sink.outputs for sink in sinks))
    os.kill(engine_pid(runtime_dir), signal.SIGKILL)
    wait_until(lambda: all(sink.errors for sink in sinks), 5.0)
    assert all(isinstance(sink.errors[0], EngineDeadError) for sink in sinks)
    wait_until(lambda: engine.is_ready)
    assert run(engine) == expected
    engine.shutdown()


def test_requests_end_when_the_engine_hangs_up(config: EngineConfig, runtime_dir: Path) -> None:
    engine = AsyncEngine.attach(config, runtime_dir=runtime_dir)
    sink = Collector()
    engine.submit(GenerationRequest(prompt="Hello", params=LONG), sink)
    wait_until(lambda: bool(sink.outputs))
    link = engine._frontend._link
    assert link is not None and link._channel is not None
    # The engine sees the end of the connection and hangs up; neither process has died.
    link._channel._socket.shutdown(socket.SHUT_WR)
    wait_until(lambda: bool(sink.errors), 10.0)
    assert isinstance(sink.errors[0], EngineDeadError)
    wait_until(lambda: engine.is_ready)
    assert run(engine)
    engine.shutdown()


def test_restarts_are_bounded(
    config: EngineConfig, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charonia.serving.engine_home.MAX_RESTARTS", 2)
    engine = AsyncEngine.attach(config, runtime_dir=runtime_dir)
    os.kill(engine_pid(runtime_dir), signal.SIGKILL)
    wait_until(lambda: not engine.is_ready)
    wait_until(lambda: engine.is_ready)
    os.kill(engine_pid(runtime_dir), signal.SIGKILL)
    newest = max(runtime_dir.glob("[0-9]*"), key=lambda path: int(path.name))
    wait_until(lambda: getattr(EngineDir(newest).read_status(), "state", None) == "failed")
    with pytest.raises(EngineDeadError, match="too often"):
        engine.submit(GenerationRequest(prompt="Hello"), Collector())
    engine.shutdown()


FRONTEND = """
import sys, time
from pathlib import Path
from charonia import AsyncEngine, EngineConfig, GenerationRequest, SamplingParams
class Sink:
    def on_output(self, output): print("token", flush=True)
    def on_error(self, error): print("error", flush=True)
config = EngineConfig(model=sys.argv[1], load_format="dummy", dtype="float32", max_num_seqs=8, cpu_threads=1)
owner_pid = int(sys.argv[4]) or None
engine = AsyncEngine.attach(config, runtime_dir=Path(sys.argv[2]), member=sys.argv[3], owner_pid=owner_pid)
engine.submit(GenerationRequest(prompt="Hi", params=SamplingParams(max_tokens=7000, ignore_eos=True)), Sink())
time.sleep(600)
"""


@contextlib.contextmanager
def frontend_process(
    config: EngineConfig, runtime_dir: Path, member: str, owner_pid: int
) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-c", FRONTEND, config.model, str(runtime_dir), member, str(owner_pid)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "token"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_frontend_death_ends_its_requests_alone(config: EngineConfig, runtime_dir: Path) -> None:
    engine = AsyncEngine.attach(config, runtime_dir=runtime_dir, member="stays")
    sink = Collector()
    engine.submit(GenerationRequest(prompt="Hello", params=LONG), sink)
    with frontend_process(config, runtime_dir, "dies", os.getpid()) as process:
        assert engine.stats().num_running <= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: engine.stats().requests_finished.get("abort") == 1)
    assert not sink.errors
    engine.shutdown()
    assert isinstance(sink.errors[0], EngineDeadError)


def test_no_engine_outlives_its_only_frontend(config: EngineConfig, runtime_dir: Path) -> None:
    with frontend_process(config, runtime_dir, "only", 0) as process:
        pid = engine_pid(runtime_dir)
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not is_alive(pid), 5.0)


def test_no_engine_outlives_its_owner(config: EngineConfig, runtime_dir: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    engine = AsyncEngine.attach(config, runtime_dir=runtime_dir, owner_pid=owner.pid)
    sink = Collector()
    engine.submit(GenerationRequest(prompt="Hello", params=LONG), sink)
    wait_until(lambda: bool(sink.outputs))
    pid = engine_pid(runtime_dir)
    owner.kill()
    owner.wait()
    wait_until(lambda: not is_alive(pid), 5.0)
    wait_until(lambda: bool(sink.errors), 5.0)
    engine.shutdown()


@pytest.mark.parametrize("when", ["queued", "prefilling", "decoding"])
def test_cancel_in_every_state(shared: AsyncEngine, config: EngineConfig, when: str) -> None:
    engine, sink = shared, Collector()
    blockers = [Collector() for _ in range(config.max_num_seqs if when == "queued" else 0)]
    handles = [engine.submit(GenerationRequest(prompt="first", params=LONG), blocker) for blocker in blockers]
    wait_until(lambda: all(blocker.outputs for blocker in blockers))
    aborts = engine.stats().requests_finished.get("abort", 0)
    prompt: str | list[int] = [5] * 6000 if when == "prefilling" else "Hello"
    handle = engine.submit(
        GenerationRequest(prompt=prompt, params=SamplingParams(max_tokens=2000, ignore_eos=True)), sink
    )
    if when == "decoding":
        wait_until(lambda: bool(sink.outputs))
    elif when == "queued":
        wait_until(lambda: engine.stats().num_waiting == 1)
    engine.abort(handle)
    engine.abort(handle)
    wait_until(lambda: bool(sink.errors), 2.0)
    wait_until(lambda: engine.stats().requests_finished.get("abort", 0) == aborts + 1)
    assert not any(blocker.errors for blocker in blockers)
    for other in handles:
        engine.abort(other)


def _fields(config: EngineConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_refusals_reach_the_sink(config: EngineConfig, runtime_dir: Path) -> None:
    engine = AsyncEngine.attach(
        EngineConfig(**{**_fields(config), "max_num_seqs": 1, "max_waiting_requests": 1}),
        runtime_dir=runtime_dir,
    )  # fmt: skip
    sinks = [Collector() for _ in range(6)]
    for sink in sinks:
        engine.submit(GenerationRequest(prompt="Hello", params=LONG), sink)
    wait_until(lambda: sum(bool(sink.errors) for sink in sinks) >= 3)
    assert "queue is full" in str(next(sink.errors[0] for sink in sinks if sink.errors))
    engine.shutdown()
    assert all(sink.ended for sink in sinks)


def test_bad_requests_raise_at_once(shared: AsyncEngine) -> None:
    engine = shared
    bad: list[GenerationRequest] = [
        GenerationRequest(prompt=""),
        GenerationRequest(prompt=[10**6]),
        GenerationRequest(prompt=[1] * 9000),
        GenerationRequest(prompt="x", params=SamplingParams(stop_token_ids=[10**6])),
        GenerationRequest(prompt=ChatInput(messages=[{"role": 5}])),
    ]
    for request in bad:
        with pytest.raises(InvalidRequestError):
            engine.submit(request, Collector())
    assert run(engine)


def test_deadline(shared: AsyncEngine) -> None:
    engine = shared
    sink = Collector()
    engine.submit(GenerationRequest(prompt="Hello", params=LONG, timeout_s=0.3), sink)
    wait_until(lambda: bool(sink.errors), 5.0)
    assert "deadline" in str(sink.errors[0])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [({"num_kv_blocks_override": 2}, (ConfigError, ModelLoadError), "max_model_len"),
     ({"load_format": "safetensors"}, ModelLoadError, "safetensors"),
     ({"skip_tokenizer_init": True}, ConfigError, "skip_tokenizer_init")],
)  # fmt: skip
def test_a_failing_start_says_why(
    config: EngineConfig, runtime_dir: Path, settings: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AsyncEngine.attach(EngineConfig(**{**_fields(config), **settings}), runtime_dir=runtime_dir)


def test_garbage_on_the_socket_is_dropped(engine_and_dir: tuple[AsyncEngine, Path]) -> None:
    engine, runtime_dir = engine_and_dir
    path = EngineDir(next(runtime_dir.glob("[0-9]*"))).socket_path
    channel = Channel.connect(path)
    for payload in (b"", b"\xff\xff", b"\x80", os.urandom(200)):
        channel.send(payload)
    # One that breaks the format itself is hung up on.
    broken = Channel.connect(path)
    os.write(broken.fileno(), b"\xff" * 64)
    wait_until(lambda: not broken.receive() and broken.closed)
    assert run(engine)
    assert not channel.receive() and not channel.closed
    channel.close()
    broken.close()


def test_the_socket_is_private_and_local(engine_and_dir: tuple[AsyncEngine, Path]) -> None:
    runtime_dir = engine_and_dir[1]
    assert runtime_dir.stat().st_mode & 0o777 == 0o700
    inodes = set()
    for fd in Path(f"/proc/{engine_pid(runtime_dir)}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since: the status file is written every second
            inodes.add(str(fd.readlink()))
    assert any(inode.startswith("socket:") for inode in inodes)
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            assert f"socket:[{line.split()[9]}]" not in inodes, "the engine must not listen on the network"


def test_a_runtime_dir_of_others_is_refused(runtime_dir: Path) -> None:
    runtime_dir.mkdir(mode=0o755)
    runtime_dir.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        EngineHome(runtime_dir)


def test_a_hung_step_ends_the_process(config: EngineConfig, runtime_dir: Path) -> None:
    # Whatever step the watchdog looks at, once a second, has run for longer than this; and it has steps for minutes.
    settings = {"step_timeout_s": 1e-5}
    engine = AsyncEngine.attach(EngineConfig(**{**_fields(config), **settings}), runtime_dir=runtime_dir)
    sinks = [Collector() for _ in range(64)]
    for sink in sinks:
        engine.submit(GenerationRequest(prompt=[7] * 100, params=LONG), sink)
    wait_until(lambda: all(sink.ended for sink in sinks), 15.0)
    assert all(isinstance(sink.errors[0], EngineDeadError) for sink in sinks)
    engine.shutdown()
