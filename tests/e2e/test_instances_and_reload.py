"""Several frontends on one engine, and a model that is reloaded under its users."""

import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from charonia.entrypoints.processes import child_processes
from charonia.entrypoints.repository import build_repository
from charonia.entrypoints.triton_server import TritonServer
from charonia_client import CharoniaClient, CharoniaClientError
from support.launch import eventually, free_ports, is_running
from support.served import START_TIMEOUT_S, TINY_FLAGS, serving

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def context_switches(pid: int) -> int:
    """How often its threads have waited for something: a measure of use."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    lines = [line for thread in threads for line in (thread / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def test_two_instances_share_one_engine(tmp_path: Path, tiny_model: Path) -> None:
    with serving(tmp_path, str(tiny_model), *TINY_FLAGS, "--instances=2") as served:
        (engine,) = served.engines()
        stubs = served.stub_pids
        assert len(stubs) == 2
        # The engine is the one process besides server and stubs, and is no child of the server.
        descendants = psutil.Process(served.process.pid).children(recursive=True)
        assert {p.pid for p in descendants} == {served.server_pid, *stubs, engine["pid"]}
        before = {pid: context_switches(pid) for pid in stubs}
        with CharoniaClient(served.grpc_url) as client:
            streams = [client.stream(f"Number {i}", max_tokens=100, ignore_eos=True) for i in range(8)]
            assert all(len(list(stream)) > 1 for stream in streams)
        used = {pid: context_switches(pid) - before[pid] for pid in stubs}
        assert min(used.values()) > 200, used
        served.wait_idle()


@pytest.fixture
def explicit(tiny_model: Path) -> Iterator[tuple[TritonServer, Path]]:
    """A server that loads and unloads models when asked to, and the model's runtime folder."""
    settings = {"model": str(tiny_model), "load_format": "dummy", "dtype": "float32", "cpu_threads": 1}
    http, grpc, metrics = free_ports()
    with tempfile.TemporaryDirectory(prefix="chr-") as folder:  # pytest's own are too long for sockets
        runtime = Path(folder) / "run"
        runtime.mkdir(mode=0o700)
        build_repository(
            Path(folder) / "models", model_name="llm", settings=settings, instances=2, runtime_dir=runtime
        )
        server = TritonServer(
            Path(folder) / "models", http_port=http, grpc_port=grpc, metrics_port=metrics, exit_timeout_s=20,
            extra_args=["--model-control-mode=explicit", "--load-model=llm"],
        )  # fmt: skip
        try:
            server.start()
            server.wait_ready(START_TIMEOUT_S)
            yield server, runtime
        finally:
            server.stop()


def engine_pids(runtime: Path) -> list[int]:
    """Of the engines that run, the oldest first."""
    found = [json.loads(path.read_bytes()) for path in runtime.glob("*/*/engine.json")]
    return [s["pid"] for s in sorted(found, key=lambda s: s["generation"]) if is_running(s["pid"])]


def control(server: TritonServer, action: str) -> None:
    url = f"http://{server.http_url}/v2/repository/models/llm/{action}"
    response = httpx.post(url, json={}, timeout=START_TIMEOUT_S)
    assert response.status_code == 200, response.text


def test_reload_and_unload_while_streaming(explicit: tuple[TritonServer, Path]) -> None:
    server, runtime = explicit
    assert server.process is not None
    server_pid = server.process.pid
    (old,) = engine_pids(runtime)
    config = next((runtime.parent / "models").glob("llm/config.pbtxt"))
    with CharoniaClient(server.grpc_url, requests_per_stream=1) as client:
        stream = client.stream("Hello", max_tokens=1500, ignore_eos=True, temperature=0.0)
        first = next(stream)
        config.write_text(config.read_text() + "\n# changed: a load is a reload\n")
        control(server, "load")
        (*_, new) = engine_pids(runtime)
        assert new != old
        assert client.generate("Hello", max_tokens=4).text
        # The old instances, and with them their engine, stay until their last request has ended.
        *_, last = stream
        assert first.text and last.finish_reason == "length"
        assert eventually(lambda: engine_pids(runtime) == [new], 60)
        assert eventually(lambda: len(child_processes(server_pid)) == 2, 60)

        results: list[Any] = []
        stream = client.stream("Hello", max_tokens=1500, ignore_eos=True)
        next(stream)
        reader = threading.Thread(target=lambda: results.extend(stream))
        reader.start()
        control(server, "unload")
        reader.join(60)
        assert results and results[-1].finish_reason == "length"
        assert eventually(lambda: engine_pids(runtime) == [], 60)
        assert eventually(lambda: child_processes(server_pid) == [], 60)
        with pytest.raises(CharoniaClientError):
            client.generate("Hello")
        control(server, "load")
        assert client.generate("Hello", max_tokens=4).text
