"""TritonServer against the real server: what it starts, and that nothing of it is left, however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.processes import child_processes, remove_leftovers
from charonia.entrypoints.triton_server import TritonServer
from support.launch import eventually, free_ports, is_running, leftovers, make_repository

pytestmark = pytest.mark.server

LAUNCHER = """
import sys, time
from pathlib import Path
from charonia.entrypoints.processes import child_processes
from charonia.entrypoints.triton_server import TritonServer
repository, ports = Path(sys.argv[1]), [int(port) for port in sys.argv[2:]]
server = TritonServer(repository, http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2])
server.start()
server.wait_ready()
print(server.process.pid, *child_processes(server.process.pid), flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = leftovers(os.getpid())
    yield
    assert leftovers(os.getpid()) == before


def make_server(repository: Path, **settings: object) -> TritonServer:
    http_port, grpc_port, metrics_port = free_ports()
    return TritonServer(
        repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, **settings
    )


def post(server: TritonServer, text: str, *, path: str = "generate", stream: bool = False) -> str:
    body = json.dumps({"text_input": text, "stream": stream}).encode()
    url = f"http://{server.http_url}/v2/models/llm/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as response:
        return response.read().decode()


def shared_memory(server: TritonServer) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"{server.shm_prefix}*")]


def test_listens_on_an_ipv6_address(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with make_server(make_repository(tmp_path), host="::1") as server:
        assert json.loads(post(server, "hello"))["text_output"] == "hello"
        with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as metrics:
            assert metrics.status == 200
        with triton.InferenceServerClient(server.grpc_url) as client:
            assert client.is_model_ready("llm")


def test_serves_and_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = make_server(make_repository(tmp_path, instances=2), log_path=log)
    # The server must outlive the thread that starts it, and die with the process alone.
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        server.wait_ready(60)
        assert server.process is not None
        stubs = child_processes(server.process.pid)
        assert len(stubs) == len(shared_memory(server)) == 2
        assert {os.getpgid(pid) for pid in stubs} == {server.process.pid} != {os.getpgid(0)}
        assert json.loads(post(server, "hello"))["text_output"] == "hello"
        events = post(server, "to be or", path="generate_stream", stream=True).split("\n\n")
        deltas = [json.loads(event.removeprefix("data: "))["text_output"] for event in events if event]
        assert deltas == ["to", "be", "or"]
        with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as metrics:
            assert b"nv_inference_request_success" in metrics.read()
    finally:
        server.stop()
    assert server.process.returncode == 0
    assert not any(map(is_running, stubs))
    assert shared_memory(server) == []
    assert "successfully unloaded 'llm'" in log.read_text()
    server.stop()


def test_failed_load_tells_the_models_own_error(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, broken='no "weights" here\nGive it some.')
    server = make_server(repository)
    with pytest.raises(LaunchError) as caught, server:
        pass
    assert "model 'llm' failed to load: ValueError: no \"weights\" here\nGive it some." in caught.value.cause
    assert "model.py" in caught.value.detail


def test_client_that_holds_its_stream_cannot_hold_up_the_stop(tmp_path: Path) -> None:
    server = make_server(make_repository(tmp_path), exit_timeout_s=1)
    answers: list[object] = []
    with server:
        client = triton.InferenceServerClient(server.grpc_url)
        client.start_stream(lambda result, error: answers.append(error or result))
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"hi"], dtype=object))
        client.async_stream_infer("llm", [text])
        assert eventually(lambda: answers)
    assert server.process is not None
    assert server.process.returncode is not None
    client.stop_stream(cancel_requests=True)
    client.close()


def start_launcher(repository: Path) -> tuple["subprocess.Popen[str]", list[int], int]:
    """A process that runs a server; its server's and stubs' pids, and the server's HTTP port."""
    ports = free_ports()
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(repository), *map(str, ports)], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    return launcher, [int(pid) for pid in launcher.stdout.readline().split()], ports[0]


def test_what_a_killed_launcher_leaves_is_cleared_by_the_next(tmp_path: Path) -> None:
    launcher, pids, http_port = start_launcher(make_repository(tmp_path, instances=2))
    bystander = make_server(make_repository(tmp_path / "other"))
    try:
        assert len(pids) == 3
        # A stub that holds the interpreter lock does not notice that its server is gone.
        body = json.dumps({"text_input": "hold"}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{http_port}/v2/models/llm/generate", body)
        with pytest.raises(OSError, match="timed out"):
            urllib.request.urlopen(request, timeout=1)
        with bystander:
            launcher.send_signal(signal.SIGKILL)
            launcher.wait()
            # The server and the idle stub go; any start of a server clears away the other stub.
            assert eventually(lambda: sum(map(is_running, pids)) <= 1, 5)
            assert not is_running(pids[0])
            remove_leftovers()
            assert not any(map(is_running, pids))
            assert leftovers(launcher.pid) == []
            assert bystander.is_ready()
            assert json.loads(post(bystander, "alive"))["text_output"] == "alive"
    finally:
        launcher.kill()
        launcher.wait()
