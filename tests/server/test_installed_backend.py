"""Charonia installed as Triton's backend `vllm`: repositories and requests of vLLM's users, unchanged."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from charonia.entrypoints.cli import main
from charonia.entrypoints.triton_binary import find_server
from charonia.entrypoints.triton_server import TritonServer
from charonia.triton.contract import INPUTS, OUTPUTS
from support.engines import tiny_model_dir
from support.scripted_server import GrpcStream, bytes_tensor, running, tensor

pytestmark = pytest.mark.server

SAMPLE_CONFIG = """
name: "vllm_model"
backend: "vllm"
max_batch_size: 0
model_transaction_policy { decoupled: True }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] },
  { name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { count: 1 kind: KIND_MODEL } ]
parameters { key: "REPORT_CUSTOM_METRICS" value { string_value: "true" } }
"""
"""What the sample repository of Triton's vLLM backend declares."""

CLI_CONFIG = '\nbackend: "vllm"\n'
"""All that triton_cli writes for a model of vLLM: the rest is auto-completed, and the kind is Triton's choice."""

SAMPLE_ARGUMENTS = {
    "disable_log_requests": True,
    "gpu_memory_utilization": 0.5,
    "enforce_eager": True,
    "disable_log_stats": False,
    "tensor_parallel_size": 1,
    "dtype": "float",
    "trust_remote_code": False,
    "swap_space": 4,
}
CLI_ARGUMENTS = {"disable_log_requests": True, "gpu_memory_utilization": 0.85}

TEST_ARGUMENTS = {
    "load_format": "dummy",
    "num_gpu_blocks_override": 200,
    "max_model_len": 512,
    "cpu_threads": 1,
}


class Backend:
    """A server whose backends are the Python backend and what `charonia install-backend` adds."""

    def __init__(self, server: TritonServer, repository: Path, model: Path) -> None:
        self.server = server
        self._repository = repository
        self._model = model
        self.http = f"http://{server.http_url}"

    def load(self, name: str, config: str, arguments: dict[str, Any], **more: Any) -> httpx.Response:
        """Add a model to the repository, and have it loaded."""
        version = self._repository / name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(config.replace('"vllm_model"', f'"{name}"'))
        settings = {"model": str(self._model)} | arguments | TEST_ARGUMENTS | more
        (version / "model.json").write_text(json.dumps(settings))
        return httpx.post(f"{self.http}/v2/repository/models/{name}/load", json={}, timeout=120)

    def config(self, name: str) -> dict[str, Any]:
        """The model's configuration as the server completed it."""
        answer: dict[str, Any] = httpx.get(f"{self.http}/v2/models/{name}/config").json()
        return answer

    def log(self) -> str:
        return self.server.log.path.read_text()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    root = tmp_path_factory.mktemp("installed")
    repository = root / "repository"
    repository.mkdir()
    find_server().prepare(root)
    # For backends that are Python files, the server takes no library from behind a link.
    backends = Path(shutil.copytree(root / "backends", root / "installed"))
    assert main(["install-backend", str(backends)]) == 0
    arguments = ["--model-control-mode=explicit", f"--backend-directory={backends}"]
    with running(repository, *arguments) as server:
        yield Backend(server, repository, tiny_model_dir(root / "tiny"))


@pytest.fixture(scope="module")
def sample(backend: Backend) -> str:
    answer = backend.load("sample", SAMPLE_CONFIG, SAMPLE_ARGUMENTS)
    assert answer.status_code == 200, answer.text
    return "sample"


def declared(config: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    return [(entry["name"], entry["data_type"]) for entry in config[kind]]


def test_the_sample_repository_of_vllms_backend(backend: Backend, sample: str) -> None:
    config = backend.config(sample)
    assert config["backend"] == "vllm"
    # What the sample declares comes first and stays as it is: there, `stream` is required.
    assert declared(config, "input")[:3] == [
        ("text_input", "TYPE_STRING"), ("stream", "TYPE_BOOL"), ("sampling_parameters", "TYPE_STRING"),
    ]  # fmt: skip
    assert not config["input"][1]["optional"]
    assert {name for name, _ in declared(config, "input")} == {spec.name for spec in INPUTS}
    assert [group["kind"] for group in config["instance_group"]] == ["KIND_MODEL"]
    warned = [line for line in backend.log().splitlines() if "engine setting" in line]
    assert len(warned) == 2
    assert any("'swap_space' is ignored" in line for line in warned)
    body = {"text_input": "Hello", "stream": False, "parameters": {"temperature": 0, "max_tokens": "3"}}
    answer = httpx.post(f"{backend.http}/v2/models/{sample}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text_output"].startswith("Hello")


def openai_request(prompt: str, stream: bool, sampling: dict[str, Any], logprobs: bool) -> list[Any]:
    """The inputs that the OpenAI frontend of the server's repository sends for a completion or a chat turn."""
    flags = {
        "stream": stream,
        "exclude_input_in_output": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_logprobs": logprobs,
    }
    return [
        bytes_tensor("text_input", prompt),
        bytes_tensor("sampling_parameters", json.dumps(sampling)),
        *(tensor(name, np.array([value]), "BOOL") for name, value in flags.items()),
    ]


FORM = {
    "json": json.dumps(
        {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        }
    ),
    "regex": None, "choice": None, "grammar": None, "json_object": None, "disable_any_whitespace": True,
    "disable_additional_properties": False, "whitespace_pattern": None, "structural_tag": None,
}  # fmt: skip
"""vLLM's class of structured outputs as a dictionary, without what differs from version to version."""
FORM_NOW = FORM | {"_backend": None, "_backend_was_auto": False}
FORM_BEFORE = FORM | {"backend": None, "backend_was_auto": False, "disable_fallback": False}

SAMPLING = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "n": 1, "temperature": 1.0, "top_p": 1.0}
"""Its schema's defaults, which it always sends."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "logprobs"),
    [
        ({"max_tokens": 5, "ignore_eos": False, "min_tokens": 5, "stop": ["\n\n"], "seed": 7}, False),
        ({"max_tokens": 5, "ignore_eos": True, "logprobs": 2, "stop": "zzz"}, True),
        # Frontends before logprobs were supported passed these two on.
        ({"max_tokens": 5, "ignore_eos": True, "logprobs": False, "best_of": 1}, False),
    ],
)
def test_what_tritons_openai_frontend_sends(
    backend: Backend, sample: str, stream: bool, extra: dict[str, Any], logprobs: bool
) -> None:
    with GrpcStream(backend.server.grpc_url) as client:
        client.send(openai_request("Hello there", stream, SAMPLING | extra, logprobs), model=sample)
        results = client.collect()[""]
    assert not isinstance(results[-1], Exception), results
    assert len(results) == 1 or stream
    texts, counts, prompt_tokens = [], 0, set()
    for result in results:
        # It reads one string, and the numbers by their first 32-bit word.
        (text,) = result.as_numpy("text_output")
        texts.append(text.decode())
        counted, given = result.as_numpy("num_output_tokens"), result.as_numpy("num_input_tokens")
        assert (counted.dtype, given.dtype, counted.size, given.size) == (np.uint32, np.uint32, 1, 1)
        counts += int(counted[0])
        prompt_tokens.add(int(given[0]))
        tokens = result.as_numpy("logprobs")
        assert (tokens is not None) == logprobs
        if logprobs:
            entries = json.loads(tokens[0])
            assert len(entries) == counted[0]
            assert {"logprob", "rank", "decoded_token"} == set(next(iter(entries[0].values())))
    assert counts == 5
    assert len(prompt_tokens) == 1
    assert not "".join(texts).startswith("Hello there")


@pytest.mark.parametrize(
    ("key", "form"), [("structured_outputs", FORM_NOW), ("guided_decoding", FORM_BEFORE)]
)
def test_a_named_tool_of_tritons_openai_frontend(
    backend: Backend, sample: str, key: str, form: dict[str, Any]
) -> None:
    """It has the tool's arguments written by the schema of its parameters."""
    sampling = SAMPLING | {"max_tokens": 100, key: json.dumps(form)}
    with GrpcStream(backend.server.grpc_url) as client:
        client.send(openai_request("Call it.", False, sampling, False), model=sample)
        (result,) = client.collect()[""]
    assert json.loads(result.as_numpy("text_output")[0])["n"] in (1, 2)


def test_an_embedding_of_tritons_openai_frontend(backend: Backend, sample: str) -> None:
    body = {"input": "Hello there", "pooling_params": {}}
    inputs = [
        bytes_tensor("embedding_request", json.dumps(body)),
        tensor("return_num_input_tokens", np.array([True]), "BOOL"),
        tensor("return_num_output_tokens", np.array([True]), "BOOL"),
    ]
    with GrpcStream(backend.server.grpc_url) as client:
        client.send(inputs, model=sample)
        (result,) = client.collect()[""]
    vector = json.loads(result.as_numpy("text_output")[0])
    assert len(vector) == 32  # the tiny model's hidden size
    assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-3)
    assert int(result.as_numpy("num_input_tokens")[0]) > 0
    assert result.as_numpy("num_output_tokens") is not None


def test_what_triton_cli_writes(backend: Backend) -> None:
    answer = backend.load("cli", CLI_CONFIG, CLI_ARGUMENTS)
    assert answer.status_code == 200, answer.text
    config = backend.config("cli")
    assert declared(config, "input") == [(spec.name, spec.data_type) for spec in INPUTS]
    assert declared(config, "output") == [(spec.name, spec.data_type) for spec in OUTPUTS]
    assert config["model_transaction_policy"] == {"decoupled": True}
    # It asks for text with these, and lets `generate` turn the rest into request parameters.
    body = {"text_input": "Hello", "stream": True, "max_tokens": 4, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{backend.http}/v2/models/cli/generate_stream", json=body, timeout=60
    ) as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert events
    assert all("error" not in event and event["text_output"] for event in events), events


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("unknown", {"invalid_attribute": True}, "unknown engine setting 'invalid_attribute'"),
        ("hub", {"model": "facebook/opt-125m"}, "facebook/opt-125m' does not exist; models are local"),
    ],
)
def test_a_model_that_cannot_be_served_fails_to_load_and_says_why(
    backend: Backend, name: str, arguments: dict[str, Any], complaint: str
) -> None:
    answer = backend.load(name, SAMPLE_CONFIG, arguments)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]


def test_metrics_under_vllms_names(backend: Backend, sample: str) -> None:
    text = httpx.get(f"http://{backend.server.metrics_url}/metrics").text
    assert f'vllm:generation_tokens_total{{model="{sample}",version="1"}}' in text
