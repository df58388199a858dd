"""The shipped `model.py` over a real engine of a tiny model: sharing it, cancelling, losing it, leaving it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from charonia.entrypoints.triton_server import TritonServer
from charonia.serving.engine_home import EngineStatus
from support.engines import tiny_model_dir
from support.scripted_server import (
    SHIPPED_MODEL,
    TEMPLATE,
    GrpcStream,
    add_model,
    eventually,
    running,
    tensors,
    texts,
)

pytestmark = pytest.mark.server
LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonServer, Path]]:
    """Two instances of one model, loaded on request so that it can be unloaded."""
    root = tmp_path_factory.mktemp("engine")
    engine = {"model": str(tiny_model_dir(root / "tiny")), "load_format": "dummy", "cpu_threads": 1}
    engine |= {"num_kv_blocks_override": 512, "dtype": "float32"}
    config = TEMPLATE.read_text().replace("count: 1", "count: 2")
    runtime = add_model(root / "repository", config=config, engine=engine, model_py=SHIPPED_MODEL)
    with running(root / "repository", "--model-control-mode=explicit", "--load-model=llm") as server:
        yield server, runtime


def engines(runtime: Path) -> list[EngineStatus]:
    """Status of every engine that the model has had, oldest first."""
    decoded = [
        msgspec.json.decode(path.read_bytes(), type=EngineStatus) for path in runtime.glob("*/*/engine.json")
    ]
    return sorted(decoded, key=lambda status: status.generation)


def generate(server: TritonServer, body: dict) -> httpx.Response:
    return httpx.post(f"http://{server.http_url}/v2/models/llm/generate", json=body, timeout=60)


def gauge(server: TritonServer, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return float(line.rpartition(" ")[2])


def test_both_instances_serve_from_one_engine(served: tuple[TritonServer, Path]) -> None:
    server, runtime = served
    assert len(engines(runtime)) == 1
    assert len(list(runtime.glob("*/*/members/*"))) == 2
    with GrpcStream(server.grpc_url) as stream:
        for i in range(12):
            stream.send(
                tensors("Once upon a time", sampling={"temperature": 0}, stream=True), request_id=str(i)
            )
        answers = {"".join(texts(results)) for results in stream.collect(12).values()}
    assert len(answers) == 1
    whole = generate(
        server, {"text_input": "Once upon a time", "temperature": 0, "exclude_input_in_output": True}
    )
    assert {whole.json()["text_output"]} == answers


def test_a_cancelled_request_gives_its_blocks_back(served: tuple[TritonServer, Path]) -> None:
    server, _ = served
    with GrpcStream(server.grpc_url) as stream:
        stream.send(tensors("Once upon a time", sampling=LONG, stream=True))
        stream.next()
        eventually(lambda: gauge(server, "charonia_kv_cache_blocks_used") > 0)
        stream.client.stop_stream(cancel_requests=True)
        eventually(lambda: gauge(server, "charonia_kv_cache_blocks_used") == 0, 10)
        assert gauge(server, "charonia_requests_running") == 0


def test_a_lost_engine_ends_its_requests_and_is_replaced(served: tuple[TritonServer, Path]) -> None:
    server, runtime = served
    with GrpcStream(server.grpc_url) as stream:
        stream.send(tensors("Once upon a time", sampling=LONG, stream=True))
        stream.next()
        os.kill(engines(runtime)[-1].pid, signal.SIGKILL)
        error = None
        while error is None:
            _, error = stream.next()
        assert "the engine was lost" in str(error)
    eventually(lambda: generate(server, {"text_input": "hi", "max_tokens": 2}).status_code == 200, 60)
    assert len(engines(runtime)) == 2


def test_unloading_ends_the_engine(served: tuple[TritonServer, Path]) -> None:
    server, runtime = served
    pid = engines(runtime)[-1].pid
    httpx.post(f"http://{server.http_url}/v2/repository/models/llm/unload", json={}).raise_for_status()
    eventually(lambda: not Path(f"/proc/{pid}").exists(), 20)
