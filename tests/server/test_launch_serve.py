"""`charonia serve` and `charonia demo` as users run them, over models that need no engine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from charonia.entrypoints.processes import child_processes
from support.launch import (
    LAUNCH_MODEL,
    eventually,
    free_ports,
    is_running,
    leftovers,
    make_checkpoint,
)
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

SERVE_MAIN = Path(__file__).parents[1] / "support" / "serve_main.py"
CHAT_MODEL = Path(__file__).parents[1] / "client" / "fake_model"
NOTICED_WITHIN_S = 5.0


class Command:
    """A running `charonia` command, and what it has printed so far."""

    def __init__(self, folder: Path, template: Path, *arguments: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVE_MAIN), str(template), *arguments], stdout=out, stderr=err
            )
        self._seen = 0

    def says(self, pattern: str, timeout_s: float = 30.0) -> bool:
        """Whether what is new on standard error comes to hold the pattern."""

        def found() -> bool:
            match = re.search(pattern, self.err.read_text()[self._seen :])
            self._seen += match.end() if match else 0
            return match is not None

        return eventually(found, timeout_s)

    @property
    def server(self) -> int:
        """Pid of its server."""
        (pid,) = child_processes(self.process.pid)
        return pid

    def everything(self) -> str:
        return f"{self.out.read_text()}\n{self.err.read_text()}"


class Serve(Command):
    """`charonia serve`, ready."""

    def __init__(self, folder: Path, *arguments: str, template: Path = LAUNCH_MODEL) -> None:
        self.ports = free_ports()
        names = ("--http-port", "--grpc-port", "--metrics-port")
        ports = [f"{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        if not any(argument.startswith("--gateway-port") for argument in arguments):
            ports.append("--gateway-port=0")
        super().__init__(
            folder, template, "serve", str(make_checkpoint(folder / "model")), *ports, *arguments
        )

    def wait_ready(self) -> None:
        assert eventually(
            lambda: "Ctrl-C stops it" in self.out.read_text() or self.process.poll() is not None, 60
        )
        assert self.process.poll() is None, self.everything()

    def ask(self, text: str) -> str:
        url = f"http://127.0.0.1:{self.ports[0]}/v2/models/llm/generate"
        body = json.dumps({"text_input": text}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as response:
            return json.loads(response.read())["text_output"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[Command], Command]]:
    """Ends commands that a failed test left running; after each, nothing of it may be left."""
    commands: list[Command] = []

    def keep(command: Command) -> Command:
        commands.append(command)
        return command

    yield keep
    for command in commands:
        if command.process.poll() is None:
            command.process.terminate()
            time.sleep(0.6)  # a second signal counts only after a while
            command.process.terminate()
            command.process.wait(30)
        assert leftovers(command.process.pid) == []


def check_curl_line(message: str) -> None:
    line = next(line.strip() for line in message.splitlines() if line.strip().startswith("curl"))
    match = re.fullmatch(r"curl -N (\S+) -d '(.*)'", line)
    assert match is not None
    url, body = match.groups()
    with urllib.request.urlopen(urllib.request.Request(url, body.encode()), timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    words = [json.loads(event.removeprefix("data: "))["text_output"] for event in events if event]
    assert words == json.loads(body)["text_input"].split()


def test_dead_stub_and_dead_server_are_replaced(tmp_path: Path, run: Callable[[Command], Command]) -> None:
    serve = Serve(tmp_path, "--instances=2", "--exit-timeout=5")
    run(serve)
    serve.wait_ready()
    check_curl_line(serve.out.read_text())
    first_server = serve.server
    stub = child_processes(first_server)[0]
    os.kill(stub, signal.SIGKILL)
    assert serve.says(
        rf"1 of 2 model instances run; the stub of llm_0_\d \(process {stub}\) was ended by SIGKILL",
        NOTICED_WITHIN_S,
    )
    assert serve.says("restarting in 1 s")
    assert not is_running(first_server)
    assert serve.says("ready again")
    second_server = serve.server
    assert serve.ask("one") == "one"
    os.kill(second_server, signal.SIGKILL)
    assert serve.says(rf"server \(process {second_server}\) was ended by SIGKILL", NOTICED_WITHIN_S)
    assert serve.says("restarting in 2 s")
    assert serve.says("ready again")
    assert serve.ask("two") == "two"
    serve.process.terminate()
    assert serve.process.wait(30) == 0, serve.everything()
    assert "Traceback" not in serve.everything()


def test_engine_is_watched(tmp_path: Path, run: Callable[[Command], Command]) -> None:
    template = tmp_path / "template"
    shutil.copytree(LAUNCH_MODEL, template)
    (template / "1" / "engine").touch()
    serve = Serve(tmp_path, "--exit-timeout=5", template=template)
    run(serve)
    serve.wait_ready()
    server = serve.server
    status_path = next(
        path for path in Path("/tmp").glob(f"charonia_*_{serve.process.pid}_*/run/engine.json")
    )
    engine = json.loads(status_path.read_text())["pid"]
    os.kill(engine, signal.SIGKILL)
    assert serve.says(rf"the engine \(process {engine}\) died", NOTICED_WITHIN_S)
    assert serve.says(r"the engine runs again, as process \d+ \(restart 1\)")
    assert serve.server == server
    Path(f"{status_path}.fail").touch()
    assert serve.says("the engine failed for good", NOTICED_WITHIN_S)
    assert serve.says("ready again")
    assert serve.server != server


def test_stop_lets_requests_finish_and_a_second_one_does_not(
    tmp_path: Path, run: Callable[[Command], Command]
) -> None:
    serves = {}
    for name in ("patient", "hasty"):
        (tmp_path / name).mkdir()
        serves[name] = Serve(tmp_path / name)
        run(serves[name])
    patient, hasty = serves.values()
    patient.wait_ready()
    hasty.wait_ready()
    with ThreadPoolExecutor(2) as pool:
        finishes, is_cut_off = pool.submit(patient.ask, "sleep 2"), pool.submit(hasty.ask, "sleep 60")
        time.sleep(0.5)
        for serve in (patient, hasty):
            serve.process.send_signal(signal.SIGTERM)
            assert serve.says("stopping")
        time.sleep(0.6)
        hasty.process.send_signal(signal.SIGTERM)
        assert finishes.result() == "sleep 2"
        assert isinstance(is_cut_off.exception(), OSError)
    assert patient.process.wait(20) == hasty.process.wait(20) == 0


def test_failed_start_tells_cause(tmp_path: Path, run: Callable[[Command], Command]) -> None:
    template = tmp_path / "template"
    shutil.copytree(LAUNCH_MODEL, template)
    (template / "1" / "broken").write_text("tensor 'model.norm.weight' is missing")
    serve = Serve(tmp_path, template=template)
    run(serve)
    assert serve.process.wait(60) == 1
    last = serve.err.read_text().splitlines()[-1]
    assert last.startswith("charonia: ")
    assert "model 'llm' failed to load: ValueError: tensor 'model.norm.weight' is missing" in last


def test_demo_starts_a_server_of_its_own(tmp_path: Path, run: Callable[[Command], Command]) -> None:
    template = tmp_path / "template"
    shutil.copytree(CHAT_MODEL, template, ignore=shutil.ignore_patterns("__pycache__"))
    config = template / "config.pbtxt"
    config.write_text(re.sub(r"KIND_CPU\s*}", "KIND_CPU count: 1 }", config.read_text()))
    model = make_checkpoint(tmp_path / "model")
    (port,) = free_ports(1)
    demo = run(Command(tmp_path, template, "demo", "who blew it", f"--http-port={port}", f"--model={model}"))
    assert demo.process.wait(60) == 0, demo.everything()
    assert "user: who blew it" in demo.out.read_text()
    assert re.search(r"4 tokens, first after \d+ ms", demo.err.read_text())


def test_apis_that_name_memory_and_files_of_the_server_are_closed(
    tmp_path: Path, run: Callable[[Command], Command]
) -> None:
    serve = Serve(tmp_path)
    run(serve)
    serve.wait_ready()

    def status(path: str, **options: object) -> int:
        url = f"http://127.0.0.1:{serve.ports[0]}/v2/{path}"
        try:
            return urllib.request.urlopen(urllib.request.Request(url, **options), timeout=20).status
        except urllib.error.HTTPError as error:
            return error.code

    region = json.dumps({"key": "/any", "offset": 0, "byte_size": 64}).encode()
    assert status("systemsharedmemory/region/any/register", data=region) == 403
    assert status("cudasharedmemory/status") == 403
    assert status("logging", data=json.dumps({"log_file": str(tmp_path / "written")}).encode()) == 403
    assert status("trace/setting", data=json.dumps({"trace_file": str(tmp_path / "t")}).encode()) == 403
    assert status("repository/models/llm/unload", data=b"{}") >= 400
    assert status("models/llm/ready") == status("models/llm/stats") == 200
    with triton.InferenceServerClient(f"127.0.0.1:{serve.ports[1]}") as client:
        for ask in (
            client.get_system_shared_memory_status,
            client.get_log_settings,
            client.get_trace_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                ask()
        assert client.is_model_ready("llm")
