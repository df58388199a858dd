"""`charonia serve` as a user runs it, over the real engine: its addresses, its processes, what it says."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from charonia.entrypoints.processes import child_processes, command_line
from support.launch import eventually, free_ports, is_running, leftovers

START_TIMEOUT_S = 180.0
"""A start takes a few seconds; machines that run tests are busy."""

TINY_FLAGS = ("--load-format=dummy", "--dtype=float32", "--cpu-threads=1", "--num-kv-blocks-override=4000")
"""For a tiny random model: one thread, and a cache so small that it is soon all in use."""

_STUB = "triton_python_backend_stub"


class Served:
    """A `charonia serve` process of model `llm`. `wait_ready` comes before anything else.

    It has a gateway only where the arguments name its port.
    """

    def __init__(self, folder: Path, model: str | None, *arguments: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self.log = folder / "server.log"
        self.http_port, self.grpc_port, self.metrics_port = free_ports()
        self.http_url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"
        command = [
            sys.executable, "-m", "charonia.entrypoints.cli", "serve", *([model] if model else []), *arguments,
            f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}", f"--log-file={self.log}",
            *([] if any(a.startswith("--gateway-port") for a in arguments) else ["--gateway-port=0"]),
        ]  # fmt: skip
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self._seen = 0

    def wait_ready(self) -> None:
        """Return once the server has told its user that it is ready."""

        def has_ended() -> bool:
            return self.process.poll() is not None

        assert eventually(lambda: "Ctrl-C stops it" in self._out.read_text() or has_ended(), START_TIMEOUT_S)
        assert not has_ended(), self.everything()

    def says(self, pattern: str, timeout_s: float = 60.0) -> bool:
        """Whether what is new on standard error comes to hold the pattern."""

        def found() -> bool:
            match = re.search(pattern, self._err.read_text()[self._seen :])
            self._seen += match.end() if match else 0
            return match is not None

        return eventually(found, timeout_s)

    def everything(self) -> str:
        """All that it and its server have said, for a failed test's report."""
        texts = [
            path.read_text(errors="replace") for path in (self._out, self._err, self.log) if path.exists()
        ]
        return "\n".join(texts)[-20_000:]

    @property
    def server_pid(self) -> int:
        """Pid of the tritonserver that runs now."""
        (pid,) = (
            pid for pid in child_processes(self.process.pid) if "charonia_client" not in command_line(pid)
        )
        return pid

    @property
    def gateway_pid(self) -> int:
        """Pid of the gateway that runs now."""
        (pid,) = (pid for pid in child_processes(self.process.pid) if "charonia_client" in command_line(pid))
        return pid

    @property
    def stub_pids(self) -> list[int]:
        """Pids of the model instances."""
        return [pid for pid in child_processes(self.server_pid) if _is_stub(pid)]

    @property
    def runtime_dir(self) -> Path:
        """Where the engine keeps its status."""
        (folder,) = Path(tempfile.gettempdir()).glob(f"charonia_*_{self.process.pid}_*_serve/run")
        return folder

    def engines(self) -> list[dict[str, Any]]:
        """Status of every engine that there was since the server started, the oldest first."""
        found = [json.loads(path.read_bytes()) for path in self.runtime_dir.glob("*/*/engine.json")]
        return sorted(found, key=lambda status: int(status["generation"]))

    @property
    def engine_pid(self) -> int:
        """Pid of the newest engine."""
        return int(self.engines()[-1]["pid"])

    def pids(self) -> dict[str, int]:
        """Every process of the service by role."""
        stubs = {f"stub {i}": pid for i, pid in enumerate(sorted(self.stub_pids))}
        return {"server": self.server_pid, "engine": self.engine_pid, **stubs}

    def is_serving(self) -> bool:
        """Whether a request is answered now."""
        body = {"text_input": "Hello", "max_tokens": 1, "temperature": 0}
        try:
            answer = httpx.post(f"{self.http_url}/v2/models/llm/generate", json=body, timeout=10)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and "text_output" in answer.json()

    def metrics(self) -> dict[str, float]:
        """Every metric by name and labels (model and version left out), as `name` or `name{label="value"}`."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        pairs = [line.rsplit(" ", 1) for line in lines]
        return {_without_model(name): float(value) for name, value in pairs}

    def wait_idle(self) -> Mapping[str, float]:
        """The metrics, once they tell that nothing runs or waits and every block is free."""
        gauges = ("charonia_requests_running", "charonia_requests_waiting", "charonia_kv_cache_blocks_used")
        idle = eventually(lambda: not any(self.metrics()[name] for name in gauges), 60.0)
        metrics = self.metrics()
        assert idle, {name: metrics[name] for name in gauges}
        return metrics


def _is_stub(pid: int) -> bool:
    arguments = command_line(pid)
    return bool(arguments) and Path(arguments[0]).name == _STUB


def _without_model(name: str) -> str:
    name = re.sub(r'(?<=[{,])(?:model|version)="[^"]*",?', "", name)
    return name.replace(",}", "}").removesuffix("{}")


@contextmanager
def serving(folder: Path, model: str | None, *arguments: str) -> Iterator[Served]:
    """A ready service, stopped afterwards as by one Ctrl-C; nothing of it may be left then."""
    served = Served(folder, model, *arguments)
    try:
        served.wait_ready()
        yield served
        if served.process.poll() is None:
            served.process.terminate()
            assert served.process.wait(90) == 0, served.everything()
        assert eventually(lambda: not leftovers(served.process.pid), 10), leftovers(served.process.pid)
    finally:
        if is_running(served.process.pid):
            served.process.kill()
            served.process.wait()
