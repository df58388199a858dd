"""Requests and responses as messages of Triton's gRPC protocol. Tensors travel as raw little-endian bytes."""

import struct
from collections.abc import Callable
from typing import Any

from tritonclient.grpc import service_pb2

from charonia_client.errors import InternalServerError, from_message
from charonia_client.requests import GenerateRequest, InputValue
from charonia_client.responses import ModelResponse

_FORMATS = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q", "FP32": "f", "FP64": "d"}
_FINAL = "triton_final_response"
_WANT_EMPTY_FINAL = "triton_enable_empty_final_response"


def encode(request: GenerateRequest) -> Any:
    """Build the ModelInferRequest.

    It asks for the empty final response that a model may send after its last content response, so that every
    request on a shared stream has a marked end.
    """
    message = service_pb2.ModelInferRequest(
        model_name=request.model, model_version=request.model_version, id=request.request_id
    )
    message.parameters[_WANT_EMPTY_FINAL].bool_param = True
    if request.timeout_us is not None:
        message.parameters["timeout"].int64_param = request.timeout_us
    for name, text in request.parameters.items():
        message.parameters[name].string_param = text
    for name, value in request.inputs.items():
        datatype, shape, data = _tensor(value)
        message.inputs.add(name=name, datatype=datatype, shape=[shape])
        message.raw_input_contents.append(data)
    return message


def is_last(message: Any) -> bool:
    """Whether a ModelStreamInferResponse is the last of its request. An error is, flagged or not."""
    return bool(message.error_message) or message.infer_response.parameters[_FINAL].bool_param


def decode(message: Any, request: GenerateRequest, *, url: str) -> ModelResponse | None:
    """Read a ModelStreamInferResponse; None for an empty final response.

    Raises what the message reports, and `InternalServerError` for tensors that cannot be read.
    """
    if message.error_message:
        raise from_message(message.error_message, url=url, model=request.model)
    response = message.infer_response
    tensors = response.outputs
    if not tensors:
        return None
    try:
        outputs = {
            tensor.name: _READERS[tensor.datatype](data)
            for tensor, data in zip(tensors, response.raw_output_contents, strict=True)
        }
    except (ValueError, KeyError, struct.error) as error:
        message = f"the server sent a tensor that cannot be read: {error!r}"
        raise InternalServerError(message, url=url, model=request.model) from error
    return ModelResponse(response.model_name, response.model_version, request.request_id, outputs)


def _tensor(value: InputValue) -> tuple[str, int, bytes]:
    if isinstance(value, bool):
        return "BOOL", 1, bytes((value,))
    if isinstance(value, str):
        data = value.encode()
        return "BYTES", 1, struct.pack("<I", len(data)) + data
    return "INT32", len(value), struct.pack(f"<{len(value)}i", *value)


def _numbers(code: str) -> Callable[[bytes], list[Any]]:
    size = struct.calcsize(f"<{code}")
    one = struct.Struct(f"<{code}").unpack

    def read(data: bytes) -> list[Any]:
        if len(data) == size:
            return list(one(data))
        return list(struct.unpack(f"<{len(data) // size}{code}", data))

    return read


def _strings(data: bytes) -> list[str]:
    """BYTES elements: a 32-bit length each, then as many bytes of UTF-8."""
    size = len(data)
    if size >= 4 and int.from_bytes(data[:4], "little") == size - 4:
        return [data[4:].decode()]
    values: list[str] = []
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<I", data, start)
        start += 4
        values.append(data[start : start + length].decode())
        start += length
    if start != len(data):
        raise ValueError(f"a string ends {start - len(data)} bytes past its tensor")
    return values


_READERS: dict[str, Callable[[bytes], list[Any]]] = {
    "BYTES": _strings,
    **{datatype: _numbers(code) for datatype, code in _FORMATS.items()},
}
