"""`charonia-client gateway` as a process."""

import os
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
    keys.write_text("# who may\nsec#ret # me\n\n")
    port = free_ports()[0]
    with command(
        f"--triton={scripted.url}", f"--port={port}", f"--api-key-file={keys}", "--served-model-name=a",
        "--served-model-name=b", "--workers=2", "--drain-timeout=2",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == f"OpenAI API at http://127.0.0.1:{port}/v1\n"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            assert http.get("/v1/models").status_code == 401
            http.headers["authorization"] = "Bearer sec#ret"
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


def test_requests_of_a_dead_worker_are_not_in_flight(scripted, fake) -> None:
    def endless(request):
        yield "one"
        yield "two"
        request.wait(60)

    fake.script = endless
    with command(f"--triton={scripted.url}", "--port=0", "--workers=2", "--drain-timeout=0") as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")

        def in_flight() -> float:
            counted = re.search(r"\nchar\w+_in_flight (\S+)", httpx.get(f"{url}/metrics", timeout=60).text)
            return float(counted[1]) if counted is not None else 0.0

        body = {"prompt": "a", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            assert in_flight() == 2
            workers = child_processes(process.pid)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert eventually(lambda: not {*workers} & {*child_processes(process.pid)}, 10)
        assert eventually(lambda: in_flight() == 1, 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_was_asked_for_is_no_failure(scripted, number) -> None:
    with command(f"--triton={scripted.url}", "--port=0", "--drain-timeout=2") as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert eventually(lambda: httpx.get(f"{address.removesuffix('/v1')}/version").status_code == 200, 20)
        process.send_signal(number)
        assert process.wait(20) == 0


def test_a_full_disk_under_its_output_closes_no_api(scripted) -> None:
    port = free_ports()[0]
    arguments = ["gateway", f"--triton={scripted.url}", f"--port={port}", "--drain-timeout=0"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "charonia_client", *arguments], stdout=full, stderr=full
        )

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/version", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        assert eventually(answers, 30)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tool-parser=nope"], "there is no tool parser 'nope'"),
        (["--triton=http://localhost:8000"], "speaks gRPC"),
        (["--api-key-file=/dev/null"], "must have 1 to"),
        (["--api-key="], "must not be empty"),
        (["--api-key=two words"], "white space"),
        (["--workers=0"], "at least 1 worker"),
        (["--port=70000"], "no port 70000"),
        (["--drain-timeout=-1"], "must not be negative"),
        (["--request-timeout=0"], "must be a positive number"),
        (["--request-timeout=nan"], "must be a positive number"),
        (["--max-body-mib=0"], "at least 1"),
        (["--host=192.0.2.1"], "assign requested address"),
    ],
)
def test_settings_that_cannot_be(capsys, arguments, message) -> None:
    from charonia_client.cli import main

    assert main(["gateway", "--port=0", *arguments]) == 2
    assert message in capsys.readouterr().err
