"""The serving contract through the real server: every front door, every output, every kind of malformed request."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from charonia.entrypoints.triton_server import TritonServer
from support.scripted_server import (
    Events,
    GrpcStream,
    add_model,
    bytes_tensor,
    eventually,
    running,
    stubs_of,
    tensor,
    tensors,
    texts,
)

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonServer, Path]]:
    root = tmp_path_factory.mktemp("requests")
    runtime = add_model(root / "repository", parameters={"ignored_request_parameters": "x-trace"})
    # A gRPC stream on which the server itself has refused a request keeps this release from ending.
    with running(root / "repository", "--disable-auto-complete-config", exit_timeout_s=2) as server:
        yield server, runtime


@pytest.fixture
def server(served: tuple[TritonServer, Path]) -> Iterator[TritonServer]:
    yield served[0]
    assert served[0].is_ready(), "the server did not survive"


@pytest.fixture
def stream(server: TritonServer) -> Iterator[GrpcStream]:
    with GrpcStream(server.grpc_url) as opened:
        yield opened


def post(server: TritonServer, body: Any, route: str = "generate") -> httpx.Response:
    return httpx.post(f"http://{server.http_url}/v2/models/llm/{route}", content=json.dumps(body), timeout=20)


def sse(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


def test_generate(server: TritonServer) -> None:
    answer = post(server, {"text_input": "one two three"})
    assert (answer.status_code, answer.json()["text_output"]) == (200, "one two threeone two three")
    answer = post(server, {"text_input": "one two three", "max_tokens": "2", "exclude_input_in_output": True})
    assert answer.json()["text_output"] == "one two"
    parameters = {"sampling_parameters": '{"max_tokens": 1}', "exclude_input_in_output": True, "id": "abc"}
    answer = post(
        server, {"text_input": "one two", "parameters": {"max_tokens": 5, "x-trace": "1"}, **parameters}
    )
    assert (answer.json()["text_output"], answer.json()["id"]) == ("one", "abc")


def test_generate_from_token_ids_and_chat(server: TritonServer) -> None:
    assert post(server, {"input_ids": [7, 8, 9]}).json()["text_output"] == "7 8 9"
    chat = json.dumps({"messages": [{"role": "user", "content": "hey"}]})
    assert post(server, {"messages": chat}).json()["text_output"] == "user: hey"


def test_generate_stream(server: TritonServer) -> None:
    body = {"text_input": '@{"delay_s": 0.1} one two three', "stream": True, "return_finish_reason": True}
    chunks = sse(post(server, body, "generate_stream"))
    assert [chunk["text_output"] for chunk in chunks] == ["one", " two", " three"]
    assert [chunk["finish_reason"] for chunk in chunks] == ["None", "None", "stop"]


def test_http_errors(server: TritonServer) -> None:
    missing = post(server, {"stream": False})
    assert (missing.status_code, "is required" in missing.json()["error"]) == (400, True)
    unknown = post(server, {"text_input": "x", "tempreature": 1})
    assert (unknown.status_code, "'tempreature'" in unknown.json()["error"]) == (400, True)
    full = post(server, {"text_input": '@{"error": "UNAVAILABLE"} x'})
    assert (full.is_error, full.json()["error"]) == (
        True,
        "scripted error",
    )  # release 24.10 says 400 to any code
    echo = {"text_input": "x", "stream": True, "exclude_input_in_output": False}
    [error] = sse(post(server, echo, "generate_stream"))
    assert error["error"] == (
        "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
    )
    late = {"text_input": '@{"error": "INTERNAL", "error_after": 2} a b c', "stream": True}
    chunks = sse(post(server, late, "generate_stream"))
    assert [*chunks[-1]] == ["error"]
    assert "".join(chunk["text_output"] for chunk in chunks[:-1]) in ("", "a", "a b")
    body = b'{"text_input": "\xff\xfe"}'
    broken = httpx.post(f"http://{server.http_url}/v2/models/llm/generate", content=body)
    assert (broken.status_code, "not valid UTF-8" in broken.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"stream": "false"}, "non-boolean as boolean"),
        ({"stream": None}, "non-boolean as boolean"),
        ({"return_timings": 1}, "non-boolean as boolean"),
        ({"text_input": None}, "non-string as string"),
        ({"sampling_parameters": {"max_tokens": 1}}, "non-string as string"),
        ({"max_tokens": None}, "'max_tokens' has invalid type"),
        ({"parameters": {"max_tokens": None}}, "'max_tokens' has invalid type"),
        ({"stop": ["b"]}, "'stop' has invalid type"),
    ],
)
def test_what_the_servers_own_parser_refuses(server: TritonServer, body: dict, complaint: str) -> None:
    """No request reaches the model here: what docs/tensors.md says of it is the server's doing."""
    answer = post(server, {"text_input": "one two"} | body)
    assert answer.is_error
    assert complaint in answer.json()["error"]


def test_casts_and_nulls_that_reach_the_model(server: TritonServer) -> None:
    sampling = {
        "max_tokens": "2",
        "ignore_eos": "true",
        "temperature": 1,
        "top_p": "0.5",
        "seed": None,
        "stop": None,
    }
    body = {"text_input": "one two three", "sampling_parameters": json.dumps(sampling)}
    answer = post(server, {**body, "exclude_input_in_output": True, "n": "1", "stop": '["x"]'})
    assert (answer.status_code, answer.json()["text_output"]) == (200, "one two")


def test_outputs_that_a_request_names(stream: GrpcStream) -> None:
    """Those and no others come back; a name that the model does not have is refused by the server."""
    for names, sent in ((["text_output"], {"text_output"}), (["finish_reason"], {"finish_reason"})):
        asked = [grpcclient.InferRequestedOutput(name) for name in names]
        stream.send(tensors("a b", stream=True, return_finish_reason=True), outputs=asked)
        results = stream.collect()[""]
        assert [{output.name for output in result.get_response().outputs} for result in results] == [
            sent
        ] * len(results)
    stream.send(tensors("a b", stream=True), outputs=[grpcclient.InferRequestedOutput("nonsense")])
    [error] = stream.collect()[""]
    assert "unexpected inference output 'nonsense'" in str(error)


def test_grpc_stream(stream: GrpcStream) -> None:
    stream.send(tensors('@{"delay_s": 0.1} one two three', stream=True))
    results = stream.collect()[""]
    assert texts(results) == ["one", " two", " three"]
    finals = [result.get_response().parameters["triton_final_response"].bool_param for result in results]
    assert finals == [False, False, True]
    stream.send(tensors("one two three", exclude_input_in_output=True))
    assert texts(stream.collect()[""]) == ["one two three"]


async def test_grpc_aio(server: TritonServer) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for name in ("a", "b"):
            yield {
                "model_name": "llm",
                "inputs": tensors(f'@{{"delay_s": 0.01}} {name} x y', stream=True),
                "request_id": name,
            }

    received: dict[str, list[str]] = {"a": [], "b": []}
    ends = 0
    async with aioclient.InferenceServerClient(server.grpc_url) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            response = result.get_response()
            received[response.id] += texts([result])
            ends += response.parameters["triton_final_response"].bool_param
            if ends == 2:
                break
    assert {name: "".join(pieces) for name, pieces in received.items()} == {"a": "a x y", "b": "b x y"}


def test_many_requests_on_one_stream_keep_apart(stream: GrpcStream) -> None:
    for i in range(64):
        stream.send(tensors(f'@{{"delay_s": 0.005}} r{i} b c d e f', stream=True), request_id=f"id{i}")
    gathered = stream.collect(64)
    assert {name: "".join(texts(results)) for name, results in gathered.items()} == {
        f"id{i}": f"r{i} b c d e f" for i in range(64)
    }


def test_a_half_closed_stream_gets_all_its_responses(server: TritonServer) -> None:
    received: list[Any] = []
    client = grpcclient.InferenceServerClient(server.grpc_url)
    client.start_stream(lambda result, error: received.append((result, error)))
    client.async_stream_infer("llm", tensors('@{"delay_s": 0.05} a b c d e f g h', stream=True))
    client.stop_stream()  # half-closes, then waits for the server's end
    assert [error for _, error in received] == [None] * 8
    assert "".join(texts([result for result, _ in received])) == "a b c d e f g h"
    client.close()


def test_a_slow_reader_gets_everything(server: TritonServer) -> None:
    body = {"text_input": '@{"tokens": 3000}', "stream": True, "max_tokens": 5000}
    url = f"http://{server.http_url}/v2/models/llm/generate_stream"
    text = b""
    with httpx.stream("POST", url, json=body, timeout=20) as response:
        time.sleep(1.0)
        for chunk in response.iter_raw():
            text += chunk
            time.sleep(0.0005)
    chunks = [
        json.loads(line[6:])["text_output"]
        for line in text.decode().splitlines()
        if line.startswith("data: ")
    ]
    assert "".join(chunks) == " ".join(f"w{i}" for i in range(3000))
    assert all(chunks)


OPTIONAL = {
    "finish_reason": "BYTES", "cumulative_logprob": "FP32", "logprobs": "BYTES", "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32", "token_ids": "INT32", "timings": "BYTES", "prompt_logprobs": "BYTES",
    "stop_reason": "BYTES",
}  # fmt: skip


def test_optional_outputs_come_when_asked_for_only(stream: GrpcStream) -> None:
    def outputs(result: Any) -> dict[str, str]:
        return {output.name: output.datatype for output in result.get_response().outputs}

    stream.send(tensors("a b", stream=True))
    assert all(outputs(result) == {"text_output": "BYTES"} for result in stream.collect()[""])
    for name, data_type in OPTIONAL.items():
        stream.send(tensors("a b", stream=True, **{f"return_{name}": True}))
        for result in stream.collect()[""]:
            assert outputs(result) == {"text_output": "BYTES", name: data_type}
    stream.send(tensors("a b", stream=True, **{f"return_{name}": False for name in OPTIONAL}))
    assert all(outputs(result) == {"text_output": "BYTES"} for result in stream.collect()[""])


def test_arrays_of_several_sequences(stream: GrpcStream) -> None:
    flags = {f"return_{name}": True for name in OPTIONAL}
    stream.send(tensors("a b", sampling={"n": 3, "logprobs": 1}, exclude_input_in_output=True, **flags))
    [result] = stream.collect()[""]
    assert result.as_numpy("text_output").tolist() == [b"a b"] * 3
    assert result.as_numpy("finish_reason").tolist() == [b"stop"] * 3
    assert result.as_numpy("cumulative_logprob").tolist() == [-1.0] * 3
    assert result.as_numpy("num_input_tokens").tolist() == [2]
    assert result.as_numpy("num_output_tokens").tolist() == [2, 2, 2]
    assert result.as_numpy("token_ids").tolist() == [101, 102, 201, 202, 301, 302]
    for positions, first in zip(result.as_numpy("logprobs"), (101, 201, 301), strict=True):
        decoded = json.loads(positions)
        assert [list(position) for position in decoded] == [[str(first)], [str(first + 1)]]
    assert result.as_numpy("prompt_logprobs").tolist() == [b"null"]
    assert result.as_numpy("stop_reason").tolist() == [b"null"] * 3
    timings = json.loads(result.as_numpy("timings")[0])
    assert set(timings) == {"queue_s", "first_token_s", "total_s", "num_cached_tokens"}


STATUSES = {
    "INVALID_ARG": "INVALID_ARGUMENT", "NOT_FOUND": "NOT_FOUND", "UNSUPPORTED": "UNIMPLEMENTED",
    "UNAVAILABLE": "UNAVAILABLE", "CANCELLED": "CANCELLED", "INTERNAL": "INTERNAL",
}  # fmt: skip


def status_of(server: TritonServer, code: str) -> str:
    """The error, as a client has it that asks for gRPC's codes; it holds its stream open until it has come."""

    async def ask() -> Exception:
        answered = asyncio.Event()

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "llm", "inputs": tensors(f'@{{"error": "{code}"}} x', stream=True)}
            await answered.wait()

        async with aioclient.InferenceServerClient(server.grpc_url) as client:
            try:
                async for _, error in client.stream_infer(requests(), headers={"triton_grpc_error": "true"}):
                    assert error is not None
            except Exception as error:
                return error
            finally:
                answered.set()
        raise AssertionError("no error")

    error = asyncio.run(ask())
    return f"{getattr(error, 'status', str)()} {error!r} {error}"


def test_grpc_error_codes(tmp_path: Path) -> None:
    """With the header `triton_grpc_error` in-band errors carry their status.

    Servers of release 24.10 may crash meanwhile, in code of their own: so this one has no other test's requests, and
    what it could not answer is asked of another.
    """
    add_model(tmp_path / "repository")
    left = dict(STATUSES)
    for _ in range(5):
        with running(tmp_path / "repository", "--disable-auto-complete-config", exit_timeout_s=2) as server:
            for code, status in list(left.items()):
                told = status_of(server, code)
                if not server.is_ready():
                    break
                assert f"StatusCode.{status}" in told
                assert "scripted error" in told
                del left[code]
        if not left:
            return
    raise AssertionError(f"five servers did not survive: {left}")


HI = bytes_tensor("text_input", "hi")


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ([bytes_tensor("text_input", b"\xff\xfe")], "not valid UTF-8"),
        ([HI, bytes_tensor("sampling_parameters", "{nonsense")], "not valid JSON"),
        ([HI, bytes_tensor("sampling_parameters", '{"max_tokens": "many"}')], "'max_tokens'"),
        ([HI, bytes_tensor("sampling_parameters", '{"stop": ' + "[" * 5000)], "nested too deeply"),
        ([HI, bytes_tensor("sampling_parameters", '{"lora_name": "x"}')], "'lora_name' is not supported"),
        ([HI, bytes_tensor("image", "aGk=")], "'image' is not supported"),
        ([bytes_tensor("embedding_request", "{}")], "'input' must be one text"),
        ([HI, tensor("input_ids", np.array([1], np.int32), "INT32")], "exclude each other"),
        ([HI, tensor("input_ids", np.array([1], np.int64), "INT64")], "data-type"),
        ([tensor("input_ids", np.array([[1, 2]], np.int32), "INT32")], "unexpected shape"),
        ([HI, tensor("stream", np.array([1], np.int32), "INT32")], "data-type"),
        ([tensor("text_input", np.array([b"a", b"b"], dtype=object), "BYTES")], "unexpected shape"),
        ([HI, tensor("nonsense", np.array([1], np.int32), "INT32")], "unexpected inference input"),
        ([], "expected number of inputs"),
    ],
)
def test_malformed_requests_get_an_error_that_says_why(
    stream: GrpcStream, inputs: list[Any], complaint: str
) -> None:
    stream.send(inputs)
    [error] = stream.collect()[""]
    assert complaint in str(error)
    stream.send(tensors("still alive", exclude_input_in_output=True))
    assert texts(stream.collect()[""]) == ["still alive"]


def test_a_raw_tensor_that_lies_about_its_length(stream: GrpcStream) -> None:
    for raw in (b"\x05\x00\x00\x00ab", b"ab", b"\xff\xff\xff\xff", b""):
        liar = grpcclient.InferInput("text_input", [1], "BYTES")
        liar._raw_content = raw
        stream.send([liar])
        result, error = stream.next()
        # An empty buffer is an empty string to the server.
        assert error is not None or raw == b"", result
    stream.send(tensors("still alive", exclude_input_in_output=True))
    assert "still alive" in [texts([r])[0] for r in stream.collect()[""] if hasattr(r, "as_numpy")]


def metric(server: TritonServer, name: str, **labels: str) -> float:
    """A series of model llm, 0 where there is none."""
    wanted = {f'{key}="{value}"' for key, value in ({"model": "llm", "version": "1"} | labels).items()}
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text
    for found, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
        if set(found.split(",")) == wanted:
            return float(value)
    return 0.0


def test_metrics(server: TritonServer) -> None:
    def requests() -> float:
        return metric(server, "charonia_requests_total", outcome="length")

    def refused() -> float:
        return metric(server, "charonia_requests_refused_total", code="INVALID_ARG")

    before, refused_before = requests(), refused()
    for _ in range(3):
        post(server, {"text_input": "a b c", "max_tokens": 2})
    post(server, {"text_input": "a", "n": 0})
    eventually(lambda: requests() >= before + 3 and refused() >= refused_before + 1)
    assert metric(server, "charonia_kv_cache_usage_ratio") == pytest.approx(0.07)
    assert metric(server, "charonia_prefix_cache_hits_total") == 20
    assert metric(server, "charonia_time_to_first_token_seconds_count") >= 3
    assert metric(server, "nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") == 100
    assert metric(server, "nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 7
    assert metric(server, "nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="tokens_per") == 16
    assert "vllm:" not in httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text


def test_the_stub_is_lean_and_knows_its_server(served: tuple[TritonServer, Path]) -> None:
    server, runtime = served
    assert server.process is not None
    [attached] = Events(runtime)("attach")
    assert attached["state"].endswith(str(server.process.pid))
    stubs = stubs_of(server.process.pid)
    assert stubs
    for pid in stubs:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
