"""A real Triton server for a benchmark, load for it, and what its processes spend."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from charonia.entrypoints.ports import http_status
from charonia.entrypoints.repository import build_repository, find_template
from charonia.entrypoints.triton_server import TritonServer

_HOST = "127.0.0.1"
_GATEWAY_START_S = 60.0
_TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server((_HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def served(
    root: Path,
    settings: Mapping[str, object],
    *,
    instances: int,
    senders: int = 2,
    server_args: str = "",
    change_model: Callable[[str], str] = str,
    ready_s: float = 120.0,
) -> Iterator[TritonServer]:
    """A ready server of the model `llm`.

    root: an empty folder. settings: of the engine. senders: sender threads of an instance. change_model: the text of
    `1/model.py` to that which is served.
    """
    template = root / "template"
    shutil.copytree(find_template(), template, ignore=shutil.ignore_patterns("__pycache__"))
    model, config = template / "1" / "model.py", template / "config.pbtxt"
    model.write_text(change_model(model.read_text()))
    parameter = f'parameters {{ key: "response_senders" value {{ string_value: "{senders}" }} }}'
    config.write_text(f"{config.read_text()}\n{parameter}\n")
    (root / "run").mkdir(mode=0o700)
    build_repository(
        root / "repository", model_name="llm", settings=settings, instances=instances,
        runtime_dir=root / "run", template=template,
    )  # fmt: skip
    http, grpc, metrics = free_ports(3)
    server = TritonServer(
        root / "repository",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        extra_args=server_args.split(),
    )
    server.start()
    try:
        server.wait_ready(ready_s)
        yield server
    finally:
        server.stop()


@contextmanager
def gateway(server: TritonServer, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """A ready OpenAI gateway in front of the server; its port is the last of its arguments."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "charonia_client", "gateway", "--triton", server.grpc_url]
    command += ["--workers", str(workers), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _GATEWAY_START_S
        while http_status(_HOST, port, "/health", timeout_s=1.0) != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the gateway does not start")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def bench_serve(root: Path, url: str, *arguments: object) -> list[dict[str, Any]]:
    """The runs of a `charonia bench serve` against a URL, as its JSON has them."""
    report = root / "report.json"
    command = [sys.executable, "-m", "charonia.entrypoints.cli"]
    command += ["bench", "serve", "--url", url, "--json", str(report)]
    run = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"bench serve failed: {run.stdout[-1000:]} {run.stderr[-2000:]}")
    runs: list[dict[str, Any]] = json.loads(report.read_text())["runs"]
    return runs


def processor_us(server: TritonServer) -> dict[str, float]:
    """Processor time so far, in microseconds, of the server, its stubs, the engine and a gateway in front of them."""
    return _by_kind(server, _processor_us)


def switches(server: TritonServer) -> dict[str, float]:
    """How often threads of the same processes have gone to sleep so far."""
    return _by_kind(server, _switches)


def _by_kind(server: TritonServer, figure: Callable[[Path], float]) -> dict[str, float]:
    assert server.process is not None
    found: dict[str, float] = {}
    for entry, command in _processes():
        if int(entry.name) == server.process.pid:
            kind = "server"
        elif "--owner-pid" in command and str(server.repository.parent) in command:
            kind = "engine"
        elif server.shm_prefix in command:
            kind = "stubs"
        elif "charonia_client gateway" in command and server.grpc_url in command:
            kind = "gateway"
        else:
            continue
        with suppress(OSError):
            found[kind] = found.get(kind, 0.0) + figure(entry)
    return found


def _processes() -> Iterator[tuple[Path, str]]:
    """Directory under /proc and command line of every process that may be looked at."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            yield entry, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _processor_us(process: Path) -> float:
    fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_US


def _switches(process: Path) -> float:
    return float(sum(map(_thread_switches, (process / "task").iterdir())))


def _thread_switches(thread: Path) -> int:
    (line,) = (
        line for line in (thread / "status").read_text().splitlines() if line.startswith("voluntary_ctxt")
    )
    return int(line.split()[1])
