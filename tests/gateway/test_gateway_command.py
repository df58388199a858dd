"""`charonia-client gateway` as a process."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from charonia.entrypoints.processes import child_processes
from support.launch import eventually, free_ports, is_running


@contextmanager
def command(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "charonia_client", "gateway", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_two_workers_with_keys(scripted, fake, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who may\nsecret # me\n\n")
    port = free_ports()[0]
    with command(
        f"--triton={scripted.url}", f"--port={port}", f"--api-key-file={keys}", "--served-model-name=a",
        "--served-model-name=b", "--workers=2", "--drain-timeout=2",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == f"OpenAI API at http://127.0.0.1:{port}/v1\n"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            assert http.get("/v1/models").status_code == 401
            http.headers["authorization"] = "Bearer secret"
            assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["a", "b"]
            body = {"model": "b", "messages": [{"role": "user", "content": "one two"}]}
            for _ in range(3):
                answer = http.post("/v1/chat/completions", json=body, headers={"connection": "close"})
                assert answer.json()["choices"][0]["message"]["content"] == "one two"
            counted = re.search(r'completions",status="200"} (\S+)', http.get("/metrics").text)
            assert counted is not None
            assert float(counted[1]) == 3
        workers = child_processes(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert eventually(lambda: not any(is_running(pid) for pid in workers), 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_was_asked_for_is_no_failure(scripted, number) -> None:
    with command(f"--triton={scripted.url}", "--port=0", "--drain-timeout=2") as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert eventually(lambda: httpx.get(f"{address.removesuffix('/v1')}/version").status_code == 200, 20)
        process.send_signal(number)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tool-parser=nope"], "there is no tool parser 'nope'"),
        (["--triton=http://localhost:8000"], "speaks gRPC"),
        (["--api-key-file=/dev/null"], "must have 1 to"),
        (["--host=192.0.2.1"], "assign requested address"),
    ],
)
def test_settings_that_cannot_be(capsys, arguments, message) -> None:
    from charonia_client.cli import main

    assert main(["gateway", "--port=0", *arguments]) == 2
    assert message in capsys.readouterr().err
