"""A server that costs next to nothing, to measure what `charonia bench serve` itself costs for each response.

    python benchmarks/serving/paced_server.py --port 18200 --step-ms 5 &
    charonia bench serve --url 127.0.0.1:18200 --concurrency 1 16 64 256 --input-len 32 --output-len 200 --json FILE

Answers Triton's gRPC streams, and over HTTP/1.1 generate_stream, /v1/completions and /v1/chat/completions: every step,
one token for each request in flight, from bytes made beforehand. A gateway may stand in between
(`charonia-client gateway --triton 127.0.0.1:18200`), to measure what that costs. It has no flow control and checks
nothing.
"""

import argparse
import asyncio
import json
import struct
from collections.abc import Container, Iterator
from typing import Any

import hpack
from tritonclient.grpc import service_pb2

TEXT = " hello"
_PREFACE = 24
_REQUEST_HEAD = b"\r\n\r\n"


def string(text: str) -> bytes:
    """An element of a BYTES tensor."""
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def grpc_message(request_id: str, wanted: Container[str], final: bool, text: str = TEXT) -> bytes:
    """A response with one token, framed for gRPC. wanted: the inputs, whose flags ask for outputs."""
    response = service_pb2.ModelInferResponse(model_name="llm", model_version="1", id=request_id)
    for name, datatype, data in (
        ("text_output", "BYTES", string(text)),
        ("finish_reason", "BYTES", string("length" if final else "None")),
        ("num_input_tokens", "UINT32", struct.pack("<I", 32)),
        ("num_output_tokens", "UINT32", struct.pack("<I", 1)),
    ):
        if name != "text_output" and f"return_{name}" not in wanted:
            continue
        response.outputs.add(name=name, datatype=datatype, shape=[1])
        response.raw_output_contents.append(data)
    response.parameters["triton_final_response"].bool_param = final
    body = service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()
    return struct.pack(">BI", 0, len(body)) + body


def events(path: str) -> tuple[bytes, bytes]:
    """A server-sent event with one token, and what ends the answer, as chunks."""
    if path.startswith("/v2"):
        event: dict[str, Any] = {
            "model_name": "llm",
            "model_version": "1",
            "num_output_tokens": 1,
            "text_output": TEXT,
        }
    else:
        choice = {"delta": {"content": TEXT}} if "chat" in path else {"text": TEXT}
        event = {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1,
            "model": "llm",
            "choices": [choice],
        }
    data = b"data: %s\n\n" % json.dumps(event).encode()
    return b"%x\r\n%s\r\n" % (len(data), data), b"0\r\n\r\n"


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">IBI", len(body) << 8 | kind, flags, stream_id) + body


class Connection(asyncio.Protocol):
    """A client's connection, of whichever protocol its first bytes tell."""

    def __init__(self, connections: "set[Connection]") -> None:
        self._connections = connections
        self._rest = b""
        self._is_http2: bool | None = None
        self._bodies: dict[int, bytes] = {}
        self._running: dict[tuple[int, str], list[Any]] = {}  # tokens left, bytes of one, bytes of the last

    def connection_made(self, transport: Any) -> None:
        """Join the others."""
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Leave."""
        self._connections.discard(self)

    def step(self) -> None:
        """Send a token for every request."""
        out = []
        for key, left in list(self._running.items()):
            left[0] -= 1
            out.append(left[1] if left[0] else left[2])
            if not left[0]:
                del self._running[key]
        if out:
            self._transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        """Take what is complete."""
        self._rest += data
        if self._is_http2 is None:
            self._is_http2 = self._rest.startswith(b"PRI")
            if self._is_http2:
                self._rest = self._rest[_PREFACE:]
                settings = struct.pack(">HI", 4, 2**31 - 1)
                self._transport.write(frame(4, 0, 0, settings) + frame(8, 0, 0, struct.pack(">I", 2**30)))
        if self._is_http2:
            for kind, flags, stream_id, body in self._frames():
                self._take_frame(kind, flags, stream_id, body)
        else:
            self._take_http1()

    def _frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        while len(self._rest) >= 9:
            word, flags, stream_id = struct.unpack_from(">IBI", self._rest)
            end = 9 + (word >> 8)
            if end > len(self._rest):
                return
            body, self._rest = self._rest[9:end], self._rest[end:]
            yield word & 0xFF, flags, stream_id, body

    def _take_frame(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        if kind == 1:
            headers = [(":status", "200"), ("content-type", "application/grpc")]
            self._transport.write(frame(1, 4, stream_id, hpack.Encoder().encode(headers)))
        elif kind == 4 and not flags & 1:
            self._transport.write(frame(4, 1, 0))
        elif kind == 0:
            data = self._bodies.get(stream_id, b"") + body
            while len(data) >= 5 and len(data) >= (end := 5 + int.from_bytes(data[1:5], "big")):
                self._begin_grpc(stream_id, service_pb2.ModelInferRequest.FromString(data[5:end]))
                data = data[end:]
            self._bodies[stream_id] = data
            if flags & 1:
                self._transport.write(frame(1, 5, stream_id, hpack.Encoder().encode([("grpc-status", "0")])))

    def _begin_grpc(self, stream_id: int, request: Any) -> None:
        inputs = {
            each.name: data for each, data in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        if "utility_request" in inputs:  # a gateway's question about the model
            self._transport.write(frame(0, 0, stream_id, grpc_message(request.id, (), True, "{}")))
            return
        count = json.loads(inputs["sampling_parameters"][4:])["max_tokens"]
        one, last = (
            frame(0, 0, stream_id, grpc_message(request.id, inputs, final)) for final in (False, True)
        )
        self._running[stream_id, request.id] = [count, one, last]

    def _take_http1(self) -> None:
        head, separator, body = self._rest.partition(_REQUEST_HEAD)
        lines = head.decode().split("\r\n")
        length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
        if not separator or len(body) < length:
            return
        self._rest = body[length:]
        request = json.loads(body[:length])
        count = request.get("max_tokens") or json.loads(request["sampling_parameters"])["max_tokens"]
        one, end = events(lines[0].split()[1])
        self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._running[0, ""] = [count, one, one + end]


async def serve(port: int, step_s: float) -> None:
    """Serve until interrupted."""
    loop, connections = asyncio.get_running_loop(), set[Connection]()
    await loop.create_server(lambda: Connection(connections), "127.0.0.1", port, backlog=1024)
    due = loop.time()
    while True:
        for connection in list(connections):
            connection.step()
        due = max(due + step_s, loop.time())
        await asyncio.sleep(due - loop.time())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A paced server of pre-made answers.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=5.0)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port, arguments.step_ms / 1e3))
