"""Triton's gRPC streams, spoken without a gRPC library, see `charonia_client.http2`."""

import asyncio
import json
import struct
import time
from contextlib import suppress
from typing import Any

import numpy as np
from charonia_client import grpc_codec
from charonia_client.http2 import Http2Connection, StreamError
from charonia_client.requests import GenerateRequest, InputValue
from tritonclient.grpc import service_pb2

from charonia.entrypoints.bench.serve.records import RequestRecord
from charonia.entrypoints.bench.serve.target import Target, sampling_of
from charonia.entrypoints.bench.serve.workload import BenchRequest

_PREFIX = struct.Struct(">BI")
"""Of a gRPC message: whether it is compressed, its length."""
_PATH = "/inference.GRPCInferenceService/ModelStreamInfer"
_INPUT_TOKENS, _OUTPUT_TOKENS, _TEXT = "num_input_tokens", "num_output_tokens", "text_output"
_parse = service_pb2.ModelStreamInferResponse.FromString
_CLOSE_TIMEOUT_S = 1.0


class TritonGrpcBackend:
    """Implements `Backend`. A user has a ModelStreamInfer call of its own, which its next request uses again, or shares
    it with others, as `requests_per_stream` says; calls are spread over the connections.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.expected_tokens: dict[str, int] = {}
        """What each request asks for, by its id, where responses do not say what they bring."""
        self._connections: list[Http2Connection] = []
        self._calls: list[_Call] = []
        self._with_room: list[_Call] = []  # calls that can take a request, the one to use next at the end
        self._over = asyncio.Event()
        self._over.set()
        scheme = "https" if target.secure else "http"
        self._headers = (
            (":method", "POST"), (":scheme", scheme), (":path", target.path + _PATH), (":authority", target.authority),
            ("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "charonia-bench"),
            *((name.lower(), value) for name, value in target.headers),
        )  # fmt: skip

    def encode(self, request: BenchRequest, request_id: str) -> bytes:
        """See `Backend`."""
        inputs: dict[str, InputValue] = {
            "stream": True,
            "exclude_input_in_output": True,
            "sampling_parameters": json.dumps(sampling_of(self._target, request)),
        }
        if self._target.count_tokens:
            inputs["return_num_output_tokens"] = True
        else:
            self.expected_tokens[request_id] = request.max_tokens
        if request.token_ids is None:
            inputs["return_num_input_tokens"] = True
        if request.token_ids is not None:
            inputs["input_ids"] = tuple(request.token_ids.tolist())
        elif request.messages is not None:
            inputs["messages"] = json.dumps(request.messages)
        else:
            inputs["text_input"] = request.text or ""
        message = grpc_codec.encode(
            GenerateRequest(self._target.model, "", request_id, inputs, stream=True, timeout=None)
        )
        data: bytes = message.SerializeToString()
        return _PREFIX.pack(0, len(data)) + data

    async def connect(self, users: int | None) -> None:
        """See `Backend`."""
        target = self._target
        loop = asyncio.get_running_loop()
        for _ in range(min(target.connections, users or target.connections)):
            _, connection = await loop.create_connection(
                Http2Connection, target.host, target.port, ssl=target.ssl_context("h2")
            )
            await connection.ready
            self._connections.append(connection)

    def send(self, payload: bytes, request_id: str, record: RequestRecord) -> None:
        """See `Backend`."""
        call = self._call_with_room()
        record.sent_ns = time.monotonic_ns()
        if call is None:
            asyncio.get_running_loop().call_soon(record.end, record.sent_ns, "no connection left")
        else:
            call.send(payload, request_id, record)
            if len(call.records) == self._target.requests_per_stream:
                self._with_room.pop()

    async def close(self) -> None:
        """See `Backend`."""
        for call in list(self._calls):
            call.close()
        # A server may keep calls open that have no requests: they are cut off.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), _CLOSE_TIMEOUT_S)
        for connection in self._connections:
            connection.close()

    def _call_with_room(self) -> "_Call | None":
        while self._with_room:
            if (call := self._with_room[-1]).is_open:
                return call
            self._with_room.pop()
        usable = [each for each in self._connections if each.is_open and each.num_streams < each.max_streams]
        if not usable:
            return None
        call = _Call(self, min(usable, key=lambda each: each.num_streams), self._headers)
        self._calls.append(call)
        self._over.clear()
        self._with_room.append(call)
        return call

    def released(self, call: "_Call") -> None:
        """A call has room again."""
        if len(call.records) == self._target.requests_per_stream - 1:
            self._with_room.append(call)

    def ended(self, call: "_Call") -> None:
        """A call is over."""
        self._calls.remove(call)
        if not self._calls:
            self._over.set()


class _Call:
    """One ModelStreamInfer call and the requests that wait on it, by id."""

    def __init__(
        self, backend: TritonGrpcBackend, connection: Http2Connection, headers: tuple[tuple[str, str], ...]
    ) -> None:
        self.records: dict[str, RequestRecord] = {}
        self.is_open = True
        self._backend = backend
        self._connection = connection
        self._rest = b""
        self._stream_id = connection.open_stream(headers, self)

    def send(self, payload: bytes, request_id: str, record: RequestRecord) -> None:
        self.records[request_id] = record
        self._connection.send(self._stream_id, payload)

    def close(self) -> None:
        """Cancel the call if it has requests, and say that no more will come otherwise."""
        self.is_open = False
        if self.records:
            self._connection.reset(self._stream_id)
            self._backend.ended(self)
        else:
            self._connection.half_close(self._stream_id)

    def on_headers(self, headers: dict[str, str]) -> None:
        """See `StreamSink`."""

    def on_data(self, data: bytes, now_ns: int) -> None:
        """See `StreamSink`."""
        if self._rest:
            data = self._rest + data
        start, size = 0, len(data)
        while size - start >= 5:
            _, length = _PREFIX.unpack_from(data, start)
            end = start + 5 + length
            if end > size:
                break
            self._receive(_parse(data[start + 5 : end]), now_ns)
            start = end
        self._rest = data[start:]

    def on_end(self, headers: dict[str, str], now_ns: int, error: StreamError | None) -> None:
        """See `StreamSink`."""
        self.is_open = False
        self._backend.ended(self)
        told = str(error)
        if error is None:
            status, text = headers.get("grpc-status", "?"), headers.get("grpc-message", "")
            told = f"the server closed the stream (HTTP {headers.get(':status', '?')}, gRPC status {status}) {text}"
        records, self.records = list(self.records.values()), {}
        for record in records:
            record.end(now_ns, told.strip())

    def _receive(self, message: Any, now_ns: int) -> None:
        response = message.infer_response
        record = self.records.get(response.id)
        if record is None:
            return
        error = message.error_message
        if not error:
            for i, output in enumerate(response.outputs):
                if output.name == _OUTPUT_TOKENS:
                    record.respond(now_ns, _total(response.raw_output_contents[i]))
                elif output.name == _INPUT_TOKENS:
                    record.prompt_tokens = _total(response.raw_output_contents[i])
                elif output.name == _TEXT and response.id in self._backend.expected_tokens:
                    record.respond(now_ns, 1)
            if not response.parameters["triton_final_response"].bool_param:
                return
        del self.records[response.id]
        record.reported_tokens = self._backend.expected_tokens.pop(response.id, None)
        self._backend.released(self)
        record.end(now_ns, error or None)


def _total(data: bytes) -> int:
    """The sum of a UINT32 tensor; a request of several sequences has a count for each."""
    if len(data) == 4:
        return int.from_bytes(data, "little")
    return int(np.frombuffer(data, "<u4").sum())
