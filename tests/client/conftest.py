"""Servers for the client's tests: scripted ones in this process, and the real Triton with a fake model."""

import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

FAKE_MODEL = Path(__file__).parent / "fake_model"
Script = Callable[[int, Iterator[Any], Any], Iterator[Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(name="free_port")
def free_port_fixture() -> int:
    return free_port()


class Answers:
    """Messages that a scripted gRPC server sends."""

    @staticmethod
    def content(request: Any, text: str, *, final: bool = False) -> Any:
        response = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id
        )
        data = text.encode()
        for name, datatype, raw in (
            ("text_output", "BYTES", struct.pack("<I", len(data)) + data),
            ("num_input_tokens", "UINT32", struct.pack("<I", 3)),
            ("num_output_tokens", "UINT32", struct.pack("<I", 1)),
        ):
            response.outputs.add(name=name, datatype=datatype, shape=[1])
            response.raw_output_contents.append(raw)
        response.parameters["triton_final_response"].bool_param = final
        return service_pb2.ModelStreamInferResponse(infer_response=response)

    @staticmethod
    def empty_final(request: Any) -> Any:
        response = service_pb2.ModelInferResponse(id=request.id)
        response.parameters["triton_final_response"].bool_param = True
        return service_pb2.ModelStreamInferResponse(infer_response=response)

    @staticmethod
    def error(request: Any, message: str) -> Any:
        """As Triton's core sends it: the id, the text and no final flag."""
        response = service_pb2.ModelInferResponse(id=request.id)
        return service_pb2.ModelStreamInferResponse(error_message=message, infer_response=response)


class ScriptedService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Runs `script(number of the call, its requests, its context)` for every ModelStreamInfer call."""

    def __init__(self, script: Script) -> None:
        self.calls = 0
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self._script = script

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        number, self.calls = self.calls, self.calls + 1
        self.metadata.append(dict(context.invocation_metadata()))
        yield from self._script(number, requests, context)


@dataclass
class ScriptedGrpc:
    url: str
    service: ScriptedService


@pytest.fixture
def answers() -> type[Answers]:
    return Answers


@pytest.fixture
def scripted_grpc() -> Iterator[Callable[..., ScriptedGrpc]]:
    """Start an in-process gRPC server whose streams run the given script; `port` fixes its port, and
    `credentials` make it speak TLS."""
    servers = []

    def start(
        script: Script, port: int = 0, *, host: str = "127.0.0.1", credentials: Any = None
    ) -> ScriptedGrpc:
        server = grpc.server(ThreadPoolExecutor(32))
        service = ScriptedService(script)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        address = f"{host}:{port}"
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
        server.start()
        servers.append(server)
        scheme = "" if credentials is None else "grpcs://"
        return ScriptedGrpc(f"{scheme}{host}:{bound}", service)

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@dataclass
class ScriptedHttp:
    url: str
    bodies: list[bytes] = field(default_factory=list)


@pytest.fixture
def scripted_http() -> Iterator[Callable[..., ScriptedHttp]]:
    """Start an HTTP server that answers requests with what `script(number)` yields: a status, then the body.

    A script that raises `ConnectionError` breaks its connection there.
    """
    servers: list[ThreadingHTTPServer] = []

    def start(script: Callable[[int], Iterator[Any]]) -> ScriptedHttp:
        result = ScriptedHttp("")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                result.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                parts = script(len(result.bodies) - 1)
                try:
                    self.send_response(next(parts))
                    self.send_header("Connection", "close")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for part in parts:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.write(b"0\r\n\r\n")
                except ConnectionError:
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        result.url = f"http://127.0.0.1:{server.server_port}"
        return result

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class FakeTriton:
    grpc_url: str
    http_url: str


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeTriton]:
    """The real Triton server with the fake model."""
    from charonia.entrypoints.triton_server import TritonServer

    repository = tmp_path_factory.mktemp("repository")
    shutil.copytree(FAKE_MODEL, repository / "llm", ignore=shutil.ignore_patterns("__pycache__"))
    server = TritonServer(
        repository, http_port=free_port(), grpc_port=free_port(), metrics_port=free_port(), exit_timeout_s=5
    )
    with server:
        yield FakeTriton(server.grpc_url, f"http://{server.http_url}")
