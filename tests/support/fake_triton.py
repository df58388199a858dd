"""A gRPC server that looks like Triton with a Charonia model, whose answers are scripted in this process.

A script takes a `FakeRequest` and yields what the model generates, piece by piece: texts, or an exception of this
module's `ModelError` to end with. Every piece counts as one token.
"""

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


class ModelError(Exception):
    """An error of the model, with the text that a client gets."""


@dataclass
class FakeRequest:
    id: str
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    is_cancelled: Callable[[], bool]
    num_responses: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        return json.loads(self.inputs.get("sampling_parameters", "{}"))

    @property
    def chat(self) -> dict[str, Any]:
        return json.loads(self.inputs["messages"])

    def wait(self, seconds: float) -> None:
        """Sleep, until the client has gone at most."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_cancelled():
            time.sleep(0.005)


Script = Callable[[FakeRequest], Iterator[str]]


def echo(request: FakeRequest) -> Iterator[str]:
    """The prompt's words, at most `max_tokens` of them."""
    if "messages" in request.inputs:
        content = request.chat["messages"][-1].get("content") or "nothing"
        text = content if isinstance(content, str) else " ".join(str(part.get("text")) for part in content)
    elif "input_ids" in request.inputs:
        text = " ".join(f"<{token}>" for token in request.inputs["input_ids"])
    else:
        text = request.inputs["text_input"]
    for i, word in enumerate((text.split() or ["empty"])[: request.sampling.get("max_tokens", 16)]):
        yield word if i == 0 else f" {word}"


@dataclass
class FakeTriton:
    """Runs scripts and remembers requests. script: what to do with the next ones."""

    script: Script = echo
    ready: bool = True
    chat_template: str | None = CHATML
    prompt_end: str = "<|im_start|>assistant\n"
    url: str = ""
    requests: list[FakeRequest] = field(default_factory=list)
    utilities: list[dict[str, Any]] = field(default_factory=list)
    cancelled: dict[str, float] = field(default_factory=dict)
    """When (monotonic) the client of which request left before the end."""

    @property
    def last(self) -> FakeRequest:
        return self.requests[-1]

    def reset(self) -> None:
        self.script, self.ready, self.chat_template = echo, True, CHATML
        self.recommended_sampling: dict[str, Any] = {}
        self.prompt_end = "<|im_start|>assistant\n"
        for log in (self.requests, self.utilities, self.cancelled):
            log.clear()

    def utility(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.utilities.append(asked)
        answer: dict[str, Any]
        ((kind, body),) = asked.items()
        if kind == "model_info":
            return {
                "max_model_len": 2048,
                "model_type": "FakeForCausalLM",
                "chat_template": self.chat_template,
                "recommended_sampling": self.recommended_sampling,
            }
        if kind == "detokenize":
            answer = {"prompt": " ".join(f"<{token}>" for token in body["tokens"])}
            if body.get("return_token_texts"):
                answer["token_texts"] = _token_texts(answer["prompt"])
            return answer
        text = body.get("prompt")
        if text is None:
            text = "".join(str(message.get("content")) for message in body["messages"]) + self.prompt_end
        answer = {
            "tokens": list(range(len(text.split()))),
            "max_model_len": 2048,
            "prompt": text,
        }
        if body.get("return_token_strs"):
            answer["token_strs"] = text.split()
        if body.get("return_token_texts"):
            answer["token_texts"] = _token_texts(text)
        return answer


def _token_texts(text: str) -> list[str]:
    return [word if i == 0 else f" {word}" for i, word in enumerate(text.split())]


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, fake: FakeTriton) -> None:
        self._fake = fake

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self._fake.ready)

    def ModelStreamInfer(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        for message in messages:
            request = _decode(message, lambda: not context.is_active())
            ended = threading.Event()

            def on_end(request: FakeRequest = request, ended: threading.Event = ended) -> None:
                if not ended.is_set():
                    self._fake.cancelled[request.id] = time.monotonic()

            context.add_callback(on_end)
            for answer in self._answers(message, request):
                if (
                    answer.error_message
                    or answer.infer_response.parameters["triton_final_response"].bool_param
                ):
                    ended.set()
                yield answer

    def _answers(self, message: Any, request: FakeRequest) -> Iterator[Any]:
        if "utility_request" in request.inputs:
            answer = self._fake.utility(json.loads(request.inputs["utility_request"]))
            yield _response(message, {"text_output": [json.dumps(answer)]}, final=True)
            return
        self._fake.requests.append(request)
        try:
            if "embedding_request" in request.inputs:
                yield self._embedding(message, request)
                return
            yield from self._generate(message, request)
        except ModelError as error:
            response = service_pb2.ModelInferResponse(id=message.id)
            yield service_pb2.ModelStreamInferResponse(error_message=str(error), infer_response=response)

    def _embedding(self, message: Any, request: FakeRequest) -> Any:
        asked = json.loads(request.inputs["embedding_request"])
        size = asked.get("pooling_params", {}).get("dimensions", 4)
        length = len(asked["input"].split()) if isinstance(asked["input"], str) else len(asked["input"])
        vector = [float(length), *[0.5] * (size - 1)]
        outputs = {"text_output": [json.dumps(vector)], "num_input_tokens": [length]}
        return _response(message, outputs, final=True)

    def _generate(self, message: Any, request: FakeRequest) -> Iterator[Any]:
        pieces = self._fake.script(request)
        if not request.inputs.get("stream"):
            found = list(pieces)
            yield self._response(message, request, found, _reason(request, len(found)))
            return
        held: str | None = None
        count = 0
        for piece in pieces:
            count += 1
            if held is not None:
                yield self._response(message, request, [held], None)
            held = piece
        yield self._response(message, request, [held or ""], _reason(request, count))

    def _response(self, message: Any, request: FakeRequest, pieces: list[str], reason: str | None) -> Any:
        count = int(request.sampling.get("n", 1))
        ids = [sum(piece.encode()) for piece in pieces]
        prompt = request.inputs.get("text_input") or " ".join(
            f"<{i}>" for i in request.inputs.get("input_ids", ())
        )
        first = request.num_responses == 0
        request.num_responses += 1
        outputs: dict[str, list[Any]] = {
            "text_output": ["".join(pieces)] * count,
            "finish_reason": [str(reason)] * count,
            "num_input_tokens": [7],
            "num_output_tokens": [len(pieces)] * count,
            "logprobs": [json.dumps(_logprobs(pieces))] * count,
            "prompt_logprobs": [json.dumps([None, *_logprobs(_token_texts(prompt)[1:])] if first else None)],
            "stop_reason": [json.dumps("END" if reason == "stop" else None)] * count,
            "token_ids": ids * count,
            "timings": [json.dumps({"num_cached_tokens": 3})],
        }
        wanted = {name: values for name, values in outputs.items() if request.inputs.get(f"return_{name}")}
        return _response(message, {"text_output": outputs["text_output"], **wanted}, final=reason is not None)


def _logprobs(pieces: list[str]) -> list[dict[str, Any]]:
    return [
        {
            str(sum(piece.encode())): {"logprob": -0.5, "rank": 1, "decoded_token": piece},
            "1": {"logprob": -1.5, "rank": 2, "decoded_token": "other"},
            "2": {"logprob": -2.5, "rank": 3, "decoded_token": "third"},
        }
        for piece in pieces
    ]


def _reason(request: FakeRequest, num_tokens: int) -> str:
    return "length" if num_tokens >= request.sampling.get("max_tokens", 16) else "stop"


_DATATYPES = {
    "num_input_tokens": ("UINT32", "I"), "num_output_tokens": ("UINT32", "I"), "token_ids": ("INT32", "i"),
}  # fmt: skip


def _response(message: Any, outputs: dict[str, list[Any]], *, final: bool) -> Any:
    response = service_pb2.ModelInferResponse(model_name=message.model_name, model_version="1", id=message.id)
    for name, values in outputs.items():
        datatype, code = _DATATYPES.get(name, ("BYTES", ""))
        if code:
            raw = struct.pack(f"<{len(values)}{code}", *values)
        else:
            raw = b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)
        response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
        response.raw_output_contents.append(raw)
    response.parameters["triton_final_response"].bool_param = final
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def _decode(message: Any, is_cancelled: Callable[[], bool]) -> FakeRequest:
    inputs: dict[str, Any] = {}
    for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            inputs[tensor.name] = raw[4:].decode()
        elif tensor.datatype == "BOOL":
            inputs[tensor.name] = raw != b"\0"
        else:
            inputs[tensor.name] = list(struct.unpack(f"<{len(raw) // 4}i", raw))
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in message.parameters.items()
    }
    return FakeRequest(message.id, inputs, parameters, is_cancelled)


@contextmanager
def fake_triton() -> Iterator[FakeTriton]:
    """A running server."""
    fake = FakeTriton()
    server = grpc.server(ThreadPoolExecutor(64))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(fake), server)
    fake.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield fake
    finally:
        server.stop(grace=None).wait()
