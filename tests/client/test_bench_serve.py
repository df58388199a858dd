"""`charonia bench serve` over the wire: a real Triton server with the fake model, and scripted servers."""

import asyncio
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from charonia.entrypoints import cli
from charonia.entrypoints.bench.serve.http_backends import Http1Backend
from charonia.entrypoints.bench.serve.records import Records
from charonia.entrypoints.bench.serve.target import Target
from charonia.entrypoints.bench.serve.triton_grpc import TritonGrpcBackend
from charonia.entrypoints.bench.serve.worker import LoadGenerator, Plan
from charonia.entrypoints.bench.serve.workload import BenchRequest
from support.launch import eventually


def target(
    url: str, backend: Any = "triton-grpc", *, requests_per_stream: int = 1, connections: int = 2
) -> Target:
    host, port = url.split("//")[-1].split(":")
    return Target(
        backend, host, int(port), False, "", "llm", (("x-test", "yes"),), {}, requests_per_stream, connections
    )


def token_requests(lengths: Sequence[int]) -> list[BenchRequest]:
    return [BenchRequest(5, token_ids=np.arange(1, length + 1, dtype=np.int32)) for length in lengths]


async def generate(
    to: Target,
    requests: list[BenchRequest],
    users: int | None = None,
    arrivals: Sequence[float] | None = None,
) -> Records:
    """One process's share of a run, in this process."""
    backend = TritonGrpcBackend(to) if to.backend == "triton-grpc" else Http1Backend(to)
    try:
        plan = Plan(requests, range(len(requests)), arrivals or [0.0] * len(requests), users, [])
        generator = LoadGenerator(backend, plan)
        await backend.connect(users)
        return await asyncio.wait_for(generator.run(time.monotonic_ns()), 20)
    finally:
        await backend.close()


# ---- gRPC ----


def answer_in_turns(answers: Any, width: int) -> Any:
    """A script that takes `width` requests and answers them token by token in turns, in a message each; then each as it
    comes: which call the later ones come on is a matter of chance.
    """

    def script(number: int, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        group = list(itertools.islice(requests, width))
        while group:
            for text in ("a", "b", "c"):
                for each in group:
                    yield answers.content(each, text, final=text == "c")
            group = list(itertools.islice(requests, 1))

    return script


@pytest.mark.parametrize(("shared", "users"), [(1, 4), (2, 4)])
async def test_calls_are_used_again_and_shared(
    scripted_grpc: Any, answers: Any, shared: int, users: int
) -> None:
    server = scripted_grpc(answer_in_turns(answers, shared))
    records = await generate(target(server.url, requests_per_stream=shared), token_requests([3] * 12), users)
    assert records.errors == (None,) * 12 and sorted(records.index) == list(range(12))
    assert records.responses.tolist() == [3] * 12 and records.output_tokens.tolist() == [3] * 12
    assert server.service.calls == users // shared
    assert server.service.metadata[0]["x-test"] == "yes"
    assert (np.diff(records.times.reshape(12, 3)) >= 0).all()
    assert (records.sent <= records.times[::3]).all() and (records.scheduled <= records.sent).all()


async def test_an_error_ends_its_request_only(scripted_grpc: Any, answers: Any) -> None:
    def script(number: int, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            yield answers.content(request, "a")
            if request.id == "1":
                yield answers.error(request, "too bad")
            else:
                yield answers.empty_final(request)

    records = await generate(target(scripted_grpc(script).url), token_requests([3] * 4), 1)
    assert records.errors == (None, "too bad", None, None) and records.responses.tolist() == [1] * 4


async def test_a_broken_call_fails_its_requests_and_the_next_begins_another(
    scripted_grpc: Any, answers: Any
) -> None:
    import grpc

    def script(number: int, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            yield answers.content(request, "a", final=number > 0)
            if number == 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone fishing")

    server = scripted_grpc(script)
    records = await generate(target(server.url), token_requests([3] * 3), 1)
    assert records.errors[1:] == (None, None) and server.service.calls == 2
    assert "gRPC status 14" in (records.errors[0] or "") and "gone fishing" in (records.errors[0] or "")


async def test_prompts_larger_than_every_window(scripted_grpc: Any, answers: Any) -> None:
    seen: list[int] = []

    def script(number: int, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            seen.append(len(request.raw_input_contents[-1]))
            yield answers.content(request, "x" * 300_000, final=True)

    lengths = [100_000, 5, 40_000, 200_000]
    records = await generate(target(scripted_grpc(script).url, connections=1), token_requests(lengths), 2)
    assert records.errors == (None,) * 4 and sorted(seen) == sorted(4 * length for length in lengths)


async def test_arrivals_do_not_wait_for_answers(scripted_grpc: Any, answers: Any) -> None:
    def script(number: int, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            time.sleep(0.3)
            yield answers.content(request, "a", final=True)

    arrivals = [0.0, 0.05, 0.1, 0.15]
    records = await generate(target(scripted_grpc(script).url), token_requests([3] * 4), None, arrivals)
    order = np.argsort(records.index)
    assert records.scheduled[order] == pytest.approx(arrivals, abs=1e-6)
    assert (records.sent >= records.scheduled).all() and records.sent.max() < records.times.min()
    capped = await generate(target(scripted_grpc(script).url), token_requests([3] * 2), 1, [0.0, 0.01])
    assert capped.sent[1] >= 0.3 and capped.scheduled[1] == pytest.approx(0.01)


# ---- HTTP ----


async def test_a_refused_connection_is_an_error_of_its_request(scripted_http: Any, free_port: int) -> None:
    to = target(f"127.0.0.1:{free_port}", "triton-http")
    with pytest.raises(OSError):  # noqa: PT011 (which one is the system's choice)
        await generate(to, token_requests([1]), 1)

    def script(number: int) -> Iterator[Any]:
        yield 200
        yield b'data: {"num_output_tokens":1}\n\n'
        if number == 0:
            raise ConnectionError

    records = await generate(target(scripted_http(script).url, "triton-http"), token_requests([1] * 2), 1)
    assert records.errors == ("connection lost: closed by the server", None)


@pytest.mark.parametrize(
    ("backend", "choice"),
    [
        ("openai", {"text": "a"}),
        ("openai-chat", {"delta": {"content": "a"}}),
        ("openai-chat", {"delta": {"reasoning_content": "a"}}),
        ("openai-chat", {"delta": {"reasoning": "a"}}),
    ],
)
async def test_openai(scripted_http: Any, backend: str, choice: dict[str, Any]) -> None:
    def script(number: int) -> Iterator[Any]:
        yield 200
        for _ in range(3):
            yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
        yield b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\ndata: [DONE]\n\n'

    server = scripted_http(script)
    requests = token_requests([2]) if backend == "openai" else [BenchRequest(5, text="Hi")]
    records = await generate(target(server.url, backend), requests, 1)
    assert records.errors == (None,) and records.responses.tolist() == [3]
    assert records.output_tokens.tolist() == [4] and records.prompt_tokens.tolist() == [9]
    body = json.loads(server.bodies[0])
    assert body["stream"] and body["max_tokens"] == 5 and body["stream_options"] == {"include_usage": True}
    assert body.get("prompt") == [1, 2] or body["messages"] == [{"role": "user", "content": "Hi"}]


# ---- the whole command ----


@pytest.mark.server
@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("triton-grpc", []),
        ("triton-grpc", ["--no-count-tokens", "--requests-per-stream=2"]),
        ("triton-http", []),
    ],
)
def test_a_sweep_of_a_real_server(
    triton: Any, backend: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures_path, requests_path = tmp_path / "a.json", tmp_path / "a.jsonl"
    url = triton.grpc_url if backend == "triton-grpc" else triton.http_url
    arguments = ["--backend", backend, "--url", url, *flags]
    arguments += ["--concurrency", "1", "3", "--num-prompts", "7", "--input-len", "9", "--output-len", "6"]
    arguments += ["--workers", "2", "--goodput", "ttft:60000", "--json", str(figures_path)]
    assert cli.main(["bench", "serve", *arguments, "--requests", str(requests_path)]) == 0
    out = capsys.readouterr().out
    assert "1 user: 7 requests" in out and "3 users: 7 requests" in out and "out tok/s" in out
    runs = json.loads(figures_path.read_text())["runs"]
    assert [run["concurrency"] for run in runs] == [1, 3]
    for run in runs:
        assert (run["completed"], run["failed"], run["prompt_tokens"], run["output_tokens"]) == (7, 0, 63, 42)
        assert run["num_responses"] == 42 and run["itl"]["count"] == 35 and run["ttft"]["count"] == 7
        assert run["mean_concurrency"] <= run["concurrency"] and run["goodput"] == run["request_throughput"]
        assert 0 < run["ttft"]["p50"] <= run["e2el"]["p50"] <= run["duration_s"] * 1e3
    lines = [json.loads(line) for line in requests_path.read_text().splitlines()]
    assert [line["index"] for line in lines] == [*range(7), *range(7)]
    assert all(line["response_tokens"] == [1] * 6 for line in lines)


@pytest.mark.server
def test_what_a_server_refuses(triton: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["bench", "serve", "--url", triton.grpc_url, "--num-prompts", "4"]
    assert cli.main([*common, "--model", "absent"]) == 1
    assert "warm-up request failed" in capsys.readouterr().err
    fake = {"fake": {"error": "UNAVAILABLE", "error_after": 1, "message": "queue full"}}
    arguments = [
        *common,
        "--num-warmups",
        "0",
        "--sampling-params",
        json.dumps(fake),
        "--request-rate",
        "100",
    ]
    assert cli.main(arguments) == 1
    assert "4 x queue full" in capsys.readouterr().out


def _num_executed(triton: Any) -> int:
    stats = httpx.get(f"{triton.http_url}/v2/models/llm/stats").json()
    return int(stats["model_stats"][0]["execution_count"])


@pytest.mark.server
def test_interrupt_reports_what_there_is(triton: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    arguments = ["--url", triton.grpc_url, "--input-len", "4", "--output-len", "4", "--concurrency", "2", "3"]
    arguments += [
        "--num-prompts",
        "1000",
        "--sampling-params",
        '{"fake": {"delay": 0.02}}',
        "--json",
        str(path),
    ]
    command = [sys.executable, "-m", "charonia.entrypoints.cli", "bench", "serve", *arguments]
    before = _num_executed(triton)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert eventually(lambda: _num_executed(triton) > before + 20, 60)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the generators hear of it too
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in err, (out, err)
    (run,) = json.loads(path.read_text())["runs"]
    assert run["interrupted"] and run["completed"] > 0 and math.isfinite(run["e2el"]["p99"])
    assert (
        run["errors"] == {"not finished when the run was interrupted": run["failed"]} and run["failed"] <= 2
    )
