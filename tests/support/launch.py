"""Help for tests that start servers: a model that idles, free ports, and what is left over afterwards."""

import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from charonia.entrypoints.processes import LaunchToken, command_line, marked_processes, process_start_time

LAUNCH_MODEL = Path(__file__).parent / "launch_model"


def free_ports(count: int = 3) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def make_repository(folder: Path, *, instances: int = 1, broken: str | None = None) -> Path:
    """A repository with the idling model `llm`."""
    model = folder / "repository" / "llm"
    shutil.copytree(LAUNCH_MODEL, model, ignore=shutil.ignore_patterns("__pycache__"))
    config = model / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", f"count: {instances}"))
    if broken is not None:
        (model / "1" / "broken").write_text(broken)
    return folder / "repository"


def make_checkpoint(folder: Path) -> Path:
    """A folder that passes for a Hugging Face model directory."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def eventually(condition: Callable[[], object], timeout_s: float = 20.0) -> bool:
    """Whether the condition comes true within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def leftovers(launcher_pid: int) -> list[str]:
    """Processes, shared memory and temporary folders of all launches of one launcher."""

    def is_its(token: LaunchToken | None) -> bool:
        return token is not None and token.pid == launcher_pid

    entries = [*Path("/dev/shm").iterdir(), *Path(tempfile.gettempdir()).iterdir()]
    found = [str(entry) for entry in entries if is_its(LaunchToken.parse(entry.name))]
    return found + [f"{pid}: {command_line(pid)}" for pid in marked_processes(is_its)]


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return process_start_time(pid) is not None
