"""The images' install steps in clean virtual environments, and the images' commands started from them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from charonia.entrypoints.default_model import ensure_default_model
from support.launch import eventually, free_ports

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ASK = "CHARONIA_TEST_SERVER_IMAGE"


def install(target: str, folder: Path) -> Path:
    """Run docker/install.sh on a copy of what the image's build copies; returns the environment's programs."""
    source = folder / "source"
    admitted = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for name in admitted:
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place)
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [source / "docker" / "install.sh", target, folder / "venv"],
        capture_output=True, text=True, env=environment, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shutil.rmtree(source)  # nothing may need it any more
    return folder / "venv" / "bin"


@contextmanager
def running(command: list[str | Path], folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A command with nothing in its environment but a PATH that has its programs; ended by SIGTERM."""
    environment = {"PATH": f"{Path(command[0]).parent}{os.pathsep}{os.defpath}", "HOME": str(folder)}
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, text=True)
    try:
        yield process
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM), (folder / "out").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def status(url: str, **headers: str) -> int:
    """The HTTP status, 0 where nobody answers."""
    try:
        return httpx.get(url, headers=headers, timeout=5).status_code
    except httpx.HTTPError:
        return 0


def test_gateway_image(tmp_path: Path) -> None:
    programs = install("gateway", tmp_path)
    frozen = subprocess.run([programs / "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"(?m)^(torch|transformers|nvidia-pytriton)==", frozen)
    # The package itself holds what the server image's build writes.
    (tmp_path / "backends").mkdir()
    subprocess.run([programs / "charonia", "install-backend", tmp_path / "backends"], check=True, timeout=60)
    assert (tmp_path / "backends" / "vllm" / "model.py").is_file()
    (tmp_path / "api_keys").write_text("secret\n")
    closed, port, _ = free_ports()
    arguments = [f"--triton=127.0.0.1:{closed}", f"--port={port}", f"--api-key-file={tmp_path / 'api_keys'}"]
    with running([programs / "charonia-client", "gateway", *arguments], tmp_path):
        url = f"http://127.0.0.1:{port}"
        # The image's health check fails as long as Triton is not there.
        assert eventually(lambda: status(f"{url}/health") == 503, 60), (tmp_path / "out").read_text()
        assert status(f"{url}/v1/models") == 401
        assert status(f"{url}/metrics") == 401
        assert status(f"{url}/metrics", Authorization="Bearer secret") == 200


@pytest.mark.timeout(1800)
@pytest.mark.skipif(ASK not in os.environ, reason=f"installs PyTorch, 3 GB; set {ASK}=1 to run it")
def test_server_image(tmp_path: Path) -> None:
    programs = install("server", tmp_path)
    # The image's base brings the server; here its wheel does.
    packages = ["-c", ROOT / "constraints.txt", "nvidia-pytriton==0.7.0"]
    subprocess.run([programs / "pip", "install", "--quiet", *packages], check=True, timeout=600)
    ports = free_ports()
    names = ("--http-port", "--grpc-port", "--metrics-port")
    arguments = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    command = [programs / "charonia", "serve", "--gateway-port=0", str(ensure_default_model()), *arguments]
    with running(command, tmp_path):
        url = f"http://127.0.0.1:{ports[0]}/v2/models/llm"
        assert eventually(lambda: status(f"{url}/ready") == 200, 180), (tmp_path / "out").read_text()
        answer = httpx.post(f"{url}/generate", json={"text_input": "Hi", "max_tokens": 2}, timeout=60)
        assert answer.json()["text_output"].startswith("Hi")
