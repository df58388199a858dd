"""The model as a part of others in the same server: a step of an ensemble, and called by a Python model (BLS)."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from charonia.entrypoints.triton_server import TritonServer
from support.scripted_server import add_model, running

pytestmark = pytest.mark.server

ENSEMBLE = """
platform: "ensemble"
max_batch_size: 0
input [
  { name: "prompt" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "streams" data_type: TYPE_BOOL dims: [ 1 ] },
  { name: "sampling" data_type: TYPE_STRING dims: [ 1 ] }
]
output [ { name: "answer" data_type: TYPE_STRING dims: [ -1 ] } ]
ensemble_scheduling { step [ {
  model_name: "llm" model_version: -1
  input_map { key: "text_input" value: "prompt" }
  input_map { key: "stream" value: "streams" }
  input_map { key: "sampling_parameters" value: "sampling" }
  output_map { key: "text_output" value: "answer" }
} ] }
"""
CALLER = """
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "prompt" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "streams" data_type: TYPE_BOOL dims: [ 1 ] },
  { name: "sampling" data_type: TYPE_STRING dims: [ 1 ] }
]
output [ { name: "answer" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
CALLER_PY = """
import triton_python_backend_utils as pb

NAMES = {"prompt": "text_input", "streams": "stream", "sampling": "sampling_parameters"}


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            inputs = [
                pb.Tensor(theirs, pb.get_input_tensor_by_name(request, ours).as_numpy())
                for ours, theirs in NAMES.items()
            ]
            call = pb.InferenceRequest(model_name="llm", requested_output_names=["text_output"], inputs=inputs)
            for response in call.exec(decoupled=True):
                if response.has_error():
                    sender.send(pb.InferenceResponse(error=response.error()))
                elif response.output_tensors():
                    text = pb.get_output_tensor_by_name(response, "text_output").as_numpy()
                    sender.send(pb.InferenceResponse(output_tensors=[pb.Tensor("answer", text)]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("composition")
    add_model(repository)
    for name, config in (("ensemble", ENSEMBLE), ("caller", CALLER)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(config)
    (repository / "caller" / "1" / "model.py").write_text(CALLER_PY)
    with running(repository) as server:
        yield server


def events(server: TritonServer, model: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    url = f"http://{server.http_url}/v2/models/{model}/generate_stream"
    text = httpx.post(url, json=body, timeout=60).text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


@pytest.mark.parametrize("name", ["ensemble", "caller"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_model_over_the_model_answers_as_it_does(server: TritonServer, name: str, stream: bool) -> None:
    prompt, sampling = '@{"delay_s": 0.5} one two three', json.dumps({"max_tokens": 2})
    own = events(server, "llm", {"text_input": prompt, "stream": stream, "sampling_parameters": sampling})
    over = events(server, name, {"prompt": prompt, "streams": stream, "sampling": sampling})
    answer = "".join(event["answer"] for event in over)
    assert answer == "".join(event["text_output"] for event in own)
    assert answer.endswith("one two")
    # Tokens that gather on a busy machine leave together, but for the first.
    assert len(over) == (2 if stream else 1)


@pytest.mark.parametrize("name", ["ensemble", "caller"])
def test_errors_pass_through(server: TritonServer, name: str) -> None:
    (event,) = events(server, name, {"prompt": "x", "streams": True, "sampling": '{"top_p": 7}'})
    assert "sampling parameter 'top_p' must be in (0, 1]" in event["error"]
