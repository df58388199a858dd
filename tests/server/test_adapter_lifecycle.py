"""Loading, unloading and ending: configurations, several instances, drain, idle streams."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from charonia.entrypoints.triton_server import TritonServer
from support.scripted_server import (
    TEMPLATE,
    Events,
    GrpcStream,
    add_model,
    eventually,
    free_ports,
    running,
    stubs_of,
    tensors,
    texts,
)

pytestmark = pytest.mark.server
EXIT_TIMEOUT_S = 6


@pytest.fixture(scope="module")
def explicit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonServer, Path]]:
    """A server that loads models on request."""
    root = tmp_path_factory.mktemp("lifecycle")
    (root / "repository").mkdir()
    with running(root / "repository", "--model-control-mode=explicit") as server:
        yield server, root / "repository"
        default_runtime = Path(f"/tmp/charonia-{os.getuid()}/{server.process.pid}")
    shutil.rmtree(default_runtime, ignore_errors=True)


def load(server: TritonServer, name: str) -> httpx.Response:
    return httpx.post(f"http://{server.http_url}/v2/repository/models/{name}/load", json={}, timeout=60)


def unload(server: TritonServer, name: str) -> None:
    answer = httpx.post(f"http://{server.http_url}/v2/repository/models/{name}/unload", json={}, timeout=60)
    answer.raise_for_status()


@pytest.mark.parametrize("name", ["backend", "empty", "none"])
def test_a_config_that_says_nothing_is_completed(explicit: tuple[TritonServer, Path], name: str) -> None:
    """It names the backend alone, or nothing, or is not there at all."""
    server, repository = explicit
    add_model(repository, name, config='backend: "python"' if name == "backend" else "")
    if name == "none":
        (repository / name / "config.pbtxt").unlink()
    assert load(server, name).status_code == 200
    config = httpx.get(f"http://{server.http_url}/v2/models/{name}/config").json()
    shipped = TEMPLATE.read_text()
    for kind in ("input", "output"):
        block = re.search(rf"^{kind} \[$(.*?)^\]$", shipped, re.MULTILINE | re.DOTALL)
        assert block is not None
        declared = re.findall(
            r'name: "(\w+)" data_type: (\w+) dims: \[ (-?\d+) \]( optional: true)?', block[1]
        )
        completed = [
            (
                entry["name"],
                entry["data_type"],
                entry["dims"][0],
                " optional: true" if entry.get("optional") else "",
            )
            for entry in config[kind]
        ]
        assert completed == [(name, kind_, int(dim), optional) for name, kind_, dim, optional in declared]
    assert config["model_transaction_policy"] == {"decoupled": True}
    with GrpcStream(server.grpc_url) as stream:
        stream.send(tensors("a b", stream=True), model=name)
        assert "".join(texts(stream.collect()[""])) == "a b"
    unload(server, name)


@pytest.mark.parametrize(
    ("name", "engine", "parameters", "complaint"),
    [
        ("typo", {"model": "m", "max_num_sequences": 5}, {}, "unknown engine setting 'max_num_sequences'"),
        ("badvalue", {"model": "m", "max_num_seqs": 0}, {}, "'max_num_seqs'"),
        ("badparam", {"model": "m"}, {"response_senders": "many"}, "'response_senders'"),
    ],
)
def test_a_wrong_configuration_fails_the_load_and_says_why(
    explicit: tuple[TritonServer, Path], name: str, engine: dict, parameters: dict, complaint: str
) -> None:
    server, repository = explicit
    add_model(repository, name, engine=engine, parameters=parameters)
    answer = load(server, name)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]
    assert httpx.get(f"http://{server.http_url}/v2/health/live").status_code == 200


def test_a_model_that_is_not_decoupled_fails_to_load(explicit: tuple[TritonServer, Path]) -> None:
    server, repository = explicit
    config = 'backend: "python"\nmodel_transaction_policy { decoupled: false }'
    add_model(repository, "coupled", config=config)
    answer = load(server, "coupled")
    assert answer.status_code == 400
    assert "decoupled" in answer.json()["error"]


def metric_values(server: TritonServer, name: str, model: str) -> list[str]:
    text = httpx.get(f"http://{server.metrics_url}/metrics").text
    return re.findall(rf'^{name}{{[^}}]*model="{model}"[^}}]*}} (\S+)$', text, re.MULTILINE)


def test_two_instances_share_the_work_and_the_metrics(explicit: tuple[TritonServer, Path]) -> None:
    server, repository = explicit
    config = TEMPLATE.read_text().replace('name: "llm"', 'name: "twice"').replace("count: 1", "count: 2")
    events = Events(add_model(repository, "twice", config=config))
    assert load(server, "twice").status_code == 200
    assert {event["request_id"] for event in events("attach")} == {"twice_0_0", "twice_0_1"}
    with GrpcStream(server.grpc_url) as stream:
        for i in range(40):
            stream.send(tensors(f"r{i} b c", stream=True), request_id=f"id{i}", model="twice")
        gathered = stream.collect(40)
    assert {name: "".join(texts(results)) for name, results in gathered.items()} == {
        f"id{i}": f"r{i} b c" for i in range(40)
    }

    def metric(name: str) -> list[str]:
        return metric_values(server, name, "twice")

    # Frontend counters add up; the engine's counters and gauges come from one instance alone.
    eventually(lambda: sum(map(float, metric("charonia_requests_total"))) == 40)
    assert metric("charonia_prefix_cache_hits_total") == ["20"]
    assert metric("charonia_kv_cache_blocks_used") == ["7"]
    unload(server, "twice")
    eventually(lambda: len(events("shutdown")) == 2)


def test_a_reload_goes_on_counting(explicit: tuple[TritonServer, Path]) -> None:
    """The new instance declares its series while the old one still has the same."""
    server, repository = explicit
    events = Events(add_model(repository, "again"))

    def count() -> float:
        return sum(map(float, metric_values(server, "charonia_requests_total", "again")))

    for number in (1, 2, 3):
        engine = {"model": "scripted", "max_num_seqs": number}  # a changed file is what makes it load anew
        (repository / "again" / "1" / "model.json").write_text(json.dumps(engine))
        assert load(server, "again").status_code == 200
        eventually(lambda number=number: len(events("shutdown")) == number - 1)
        with GrpcStream(server.grpc_url) as stream:
            stream.send(tensors("a b"), model="again")
            stream.collect()
        eventually(lambda number=number: count() == number)
    unload(server, "again")
    eventually(lambda: len(events("shutdown")) == 3)
    assert count() == 3


def test_a_server_that_warmed_its_model_up_still_gets_its_drain(tmp_path: Path) -> None:
    """The requests of `model_warmup` are there before the server listens, which is how its exit is noticed."""
    warmup = """
model_warmup [ { name: "hello" batch_size: 1 inputs {
  key: "text_input" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "hello" }
} } ]"""
    repository = tmp_path / "repository"
    parameters = {"drain_timeout_s": "0.5"}
    events = Events(add_model(repository, config=TEMPLATE.read_text() + warmup, parameters=parameters))
    (repository / "llm" / "warmup").mkdir()
    (repository / "llm" / "warmup" / "hello").write_bytes(b"\x03\x00\x00\x00a b")
    with running(repository) as server:
        assert len(events("submit")) == 1
        with GrpcStream(server.grpc_url) as stream:
            endless = tensors(
                '@{"delay_s": 0.05, "tokens": 9999}', sampling={"max_tokens": 9999}, stream=True
            )
            stream.send(endless, request_id="endless")
            events.wait("scheduled", "endless")
            server.request_stop()
            assert "the server is shutting down" in str(stream.collect()[""][0])


def test_unloading_waits_for_live_requests(explicit: tuple[TritonServer, Path]) -> None:
    server, repository = explicit
    events = Events(add_model(repository, "leaving"))
    assert load(server, "leaving").status_code == 200
    with GrpcStream(server.grpc_url) as stream:
        stream.send(
            tensors('@{"delay_s": 0.05} a b c d e f g h', stream=True), request_id="r", model="leaving"
        )
        events.wait("scheduled", "r")
        unload(server, "leaving")
        assert "".join(texts(stream.collect()["r"])) == "a b c d e f g h"
    assert events.wait("shutdown", "")["state"] == "0"


def start(root: Path) -> tuple[TritonServer, Events]:
    runtime = add_model(root / "repository")
    http, grpc, metrics = free_ports(3)
    server = TritonServer(
        root / "repository",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        exit_timeout_s=EXIT_TIMEOUT_S,
    )
    server.start()
    server.wait_ready()
    return server, Events(runtime)


def test_sigterm_drains_then_aborts(tmp_path: Path) -> None:
    """A request that would outlast the server's exit timeout is ended in time, with a clear error."""
    server, events = start(tmp_path)
    stubs = stubs_of(server.process.pid)
    assert stubs
    try:
        with httpx.Client() as client:
            url = f"http://{server.http_url}/v2/models/llm/generate"
            client.post(url, json={"text_input": "warm up"}).raise_for_status()
        stream = GrpcStream(server.grpc_url)
        stream.send(tensors('@{"delay_s": 0.1} a b c d e f', stream=True), request_id="short")
        stream.send(
            tensors('@{"delay_s": 0.1, "tokens": 9999}', sampling={"max_tokens": 9999}, stream=True),
            request_id="endless",
        )
        events.wait("scheduled", "endless")
        assert server.process is not None
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        gathered = stream.collect(2, timeout_s=EXIT_TIMEOUT_S)
        assert time.monotonic() - begun < EXIT_TIMEOUT_S
        assert "".join(texts(gathered["short"])) == "a b c d e f"
        assert "the server is shutting down" in str(gathered[""][0])
        stream.client.stop_stream()
        stream.client.close()
        assert server.process.wait(EXIT_TIMEOUT_S + 10) == 0
        assert len(events("shutdown")) == 1
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stubs))
    finally:
        server.kill()
    assert not list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))


def test_an_idle_open_stream_holds_the_server_and_killing_it_leaves_nothing(tmp_path: Path) -> None:
    """The server never calls `finalize` here; `stop` kills it after its exit timeout, and the stub follows."""
    server, events = start(tmp_path)
    stubs = stubs_of(server.process.pid)
    stream = GrpcStream(server.grpc_url)
    try:
        stream.send(tensors("a b", stream=True))
        stream.collect()
        server.stop()
        assert server.process is not None
        assert server.process.poll() is not None
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stubs))
    finally:
        server.kill()
        stream.client.close()
    assert not list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))
    assert events("shutdown") == []
