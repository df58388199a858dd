"""Questions about the server and its models, each with its gRPC and its HTTP form."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerHealth:
    """live: the server runs. ready: it takes requests. model_ready: so does the model asked about."""

    live: bool
    ready: bool
    model: str
    model_ready: bool


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Name and version of the server, and the protocol extensions it offers."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output of a model; -1 in the shape is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's versions, platform and tensors."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, slots=True)
class Query(Generic[T]):
    """One question: the RPC and its request, the HTTP path, and how to read either answer.

    model: the model asked about; None when it is about the server. read_grpc: takes the response message.
    read_http: takes the decoded JSON body. no: the answer that a HTTP 400 or 503 stands
    for; None where that is an error.
    """

    rpc: str
    message: Message
    path: str
    model: str | None
    read_grpc: Callable[[Any], T]
    read_http: Callable[[Any], T]
    no: T | None = None


def server_live() -> Query[bool]:
    """Whether the server runs."""
    return Query(
        "ServerLive",
        service_pb2.ServerLiveRequest(),
        "/v2/health/live",
        None,
        lambda m: bool(m.live),
        _yes,
        False,
    )


def server_ready() -> Query[bool]:
    """Whether the server takes requests."""
    return Query(
        "ServerReady",
        service_pb2.ServerReadyRequest(),
        "/v2/health/ready",
        None,
        lambda m: bool(m.ready),
        _yes,
        False,
    )


def model_ready(model: str, version: str = "") -> Query[bool]:
    """Whether the model takes requests; a model that does not exist does not."""
    message = service_pb2.ModelReadyRequest(name=model, version=version)
    path = model_path(model, version) + "/ready"
    return Query("ModelReady", message, path, model, lambda m: bool(m.ready), _yes, False)


def server_metadata() -> Query[ServerMetadata]:
    """Name, version and extensions of the server."""
    return Query(
        "ServerMetadata",
        service_pb2.ServerMetadataRequest(),
        "/v2",
        None,
        lambda m: ServerMetadata(m.name, m.version, tuple(m.extensions)),
        lambda body: ServerMetadata(body["name"], body["version"], tuple(body["extensions"])),
    )


def model_metadata(model: str, version: str = "") -> Query[ModelMetadata]:
    """Versions, platform and tensors of a model."""
    message = service_pb2.ModelMetadataRequest(name=model, version=version)
    return Query(
        "ModelMetadata",
        message,
        model_path(model, version),
        model,
        lambda m: ModelMetadata(
            m.name, tuple(m.versions), m.platform, _grpc_tensors(m.inputs), _grpc_tensors(m.outputs)
        ),
        lambda body: ModelMetadata(
            body["name"],
            tuple(body.get("versions", ())),
            body["platform"],
            _http_tensors(body["inputs"]),
            _http_tensors(body["outputs"]),
        ),
    )


def model_config(model: str, version: str = "") -> Query[dict[str, Any]]:
    """A model's configuration (``config.pbtxt`` after auto-completion), with the field names of that file."""
    return Query(
        "ModelConfig",
        service_pb2.ModelConfigRequest(name=model, version=version),
        model_path(model, version) + "/config",
        model,
        lambda m: MessageToDict(m.config, preserving_proto_field_name=True),
        dict,
    )


def model_path(model: str, version: str = "") -> str:
    """The HTTP path of a model."""
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def error_text(body: bytes) -> str:
    """The message of a HTTP error answer, which Triton sends as JSON or as one event, and a proxy as any
    text.
    """
    try:
        return str(json.loads(body.strip().removeprefix(b"data:"))["error"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace").strip()


def _yes(body: Any) -> bool:
    return True


def _grpc_tensors(tensors: Any) -> tuple[TensorMetadata, ...]:
    return tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in tensors)


def _http_tensors(tensors: Any) -> tuple[TensorMetadata, ...]:
    return tuple(TensorMetadata(t["name"], t["datatype"], tuple(t["shape"])) for t in tensors)
