"""A real Triton server over the real adapter and a scripted engine."""

import atexit
import json
import queue
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from charonia.entrypoints.triton_server import TritonServer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "model_repository" / "llm" / "config.pbtxt"
SHIPPED_MODEL = ROOT / "model_repository" / "llm" / "1" / "model.py"
SCRIPTED_MODEL = Path(__file__).with_name("scripted_model.py")


def add_model(
    repository: Path, name: str = "llm", *, config: str | None = None, engine: dict[str, Any] | None = None,
    parameters: dict[str, str] | None = None, model_py: Path = SCRIPTED_MODEL,
) -> Path:  # fmt: skip
    """Put a model into the repository, by default over the scripted engine, which notes `<runtime>/*/events.jsonl`.

    config: text of config.pbtxt, by default the shipped one. engine: model.json. Returns the runtime folder.
    """
    version = repository / name / "1"
    version.mkdir(parents=True)
    runtime = Path(tempfile.mkdtemp(prefix="charonia-test-"))  # pytest's own folders are too long for sockets
    atexit.register(shutil.rmtree, runtime, ignore_errors=True)
    settings = {"runtime_dir": str(runtime)} | (parameters or {})
    text = TEMPLATE.read_text().replace('name: "llm"', f'name: "{name}"') if config is None else config
    for key, value in settings.items():
        text += f'\nparameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
    (repository / name / "config.pbtxt").write_text(text)
    (version / "model.json").write_text(json.dumps(engine or {"model": "scripted"}))
    (version / "model.py").symlink_to(model_py)
    (version / "support").symlink_to(Path(__file__).parent)
    return runtime


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(repository: Path, *extra_args: str, exit_timeout_s: int = 10) -> Iterator[TritonServer]:
    """The server, ready; stopped on the way out."""
    http, grpc, metrics = free_ports(3)
    server = TritonServer(
        repository, http_port=http, grpc_port=grpc, metrics_port=metrics, extra_args=extra_args,
        exit_timeout_s=exit_timeout_s,
    )  # fmt: skip
    with server:
        yield server


def stubs_of(server_pid: int) -> list[int]:
    """Pids of the server's Python stubs."""
    children = Path(f"/proc/{server_pid}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


class Events:
    """What the scripted engine has noted."""

    def __init__(self, runtime: Path) -> None:
        self._runtime = runtime

    def __call__(self, event: str, request_id: str | None = None) -> list[dict[str, Any]]:
        lines = [
            line for path in self._runtime.glob("*/events.jsonl") for line in path.read_text().splitlines()
        ]
        return [
            entry
            for entry in map(json.loads, lines)
            if entry["event"] == event and request_id in (None, entry["request_id"])
        ]

    def wait(self, event: str, request_id: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """The first such event, which is awaited."""
        eventually(lambda: self(event, request_id), timeout_s)
        return self(event, request_id)[0]


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def tensors(prompt: str | bytes, *, sampling: dict[str, Any] | None = None, **flags: bool) -> list[Any]:
    """Inputs for tritonclient."""
    inputs = [bytes_tensor("text_input", prompt)]
    if sampling is not None:
        inputs.append(bytes_tensor("sampling_parameters", json.dumps(sampling)))
    for name, value in flags.items():
        inputs.append(tensor(name, np.array([value]), "BOOL"))
    return inputs


def tensor(name: str, array: Any, data_type: str) -> Any:
    """One input."""
    made = grpcclient.InferInput(name, list(array.shape), data_type)
    made.set_data_from_numpy(array)
    return made


def bytes_tensor(name: str, value: str | bytes) -> Any:
    """One string input."""
    return tensor(
        name, np.array([value if isinstance(value, bytes) else value.encode()], dtype=object), "BYTES"
    )


class GrpcStream:
    """A sync gRPC stream; use as a context."""

    def __init__(self, url: str) -> None:
        self.client = grpcclient.InferenceServerClient(url)
        self._received: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self._received.put((result, error)))

    def __enter__(self) -> "GrpcStream":
        return self

    def __exit__(self, failure: object, *rest: object) -> None:
        # Releases up to 24.10 lose track of streams that are cancelled just after their last response.
        self.client.stop_stream(cancel_requests=failure is not None)
        self.client.close()

    def send(self, inputs: list[Any], request_id: str = "", model: str = "llm", **options: Any) -> None:
        """Send a request."""
        self.client.async_stream_infer(
            model, inputs, request_id=request_id, enable_empty_final_response=True, **options
        )

    def next(self, timeout_s: float = 10.0) -> tuple[Any, Any]:
        """The next (result, error)."""
        return self._received.get(timeout=timeout_s)

    def collect(self, requests: int = 1, timeout_s: float = 20.0) -> dict[str, list[Any]]:
        """Everything up to the FINAL of so many requests: results by request id; an error ends its request."""
        gathered: dict[str, list[Any]] = {}
        while requests:
            result, error = self.next(timeout_s)
            if error is not None:
                gathered.setdefault("", []).append(error)
                requests -= 1
                continue
            response = result.get_response()
            gathered.setdefault(response.id, []).append(result)
            requests -= response.parameters["triton_final_response"].bool_param
        return gathered


def texts(results: list[Any]) -> list[str]:
    """The first sequence's text in each of the results."""
    return [result.as_numpy("text_output")[0].decode() for result in results]
