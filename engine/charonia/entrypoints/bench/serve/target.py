"""What is measured: an address, a protocol, and what every request asks for."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from charonia.entrypoints.bench.serve.records import RequestRecord
from charonia.entrypoints.bench.serve.workload import BenchRequest
from charonia.errors import CharoniaError, ConfigError, ErrorCode

BackendName = Literal["triton-grpc", "triton-http", "openai", "openai-chat"]

DEFAULT_PORTS: dict[BackendName, int] = {
    "triton-grpc": 8001,
    "triton-http": 8000,
    "openai": 9000,
    "openai-chat": 9000,
}


class BenchError(CharoniaError):
    """Load could not be generated: no server, a generator that died."""

    code = ErrorCode.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    path: what the URL had after host and port, without a slash at its end. headers: of every request.
    sampling: sampling parameters of every request but its `max_tokens`.
    requests_per_stream: requests that share one gRPC call. connections: TCP connections for gRPC, of one process.
    count_tokens: gRPC: have every response say how many tokens it brings.
    """

    backend: BackendName
    host: str
    port: int
    secure: bool
    path: str
    model: str
    headers: tuple[tuple[str, str], ...]
    sampling: Mapping[str, Any]
    requests_per_stream: int
    connections: int
    count_tokens: bool = True

    @property
    def authority(self) -> str:
        """Host and port; IPv6 hosts in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def ssl_context(self, *protocols: str) -> ssl.SSLContext | None:
        """For a secure server, with the protocols to negotiate."""
        if not self.secure:
            return None
        context = ssl.create_default_context()
        context.set_alpn_protocols(list(protocols))
        return context


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    secure: bool
    path: str


def parse_url(text: str, default_port: int) -> Address:
    """Read `[http|https|grpc|grpcs://]host[:port][/path]`. Raises `ConfigError`."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    parts = urlsplit(f"//{rest}")
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--url {text!r} has no valid port: {error}") from None
    if (
        scheme not in ("http", "https", "grpc", "grpcs")
        or not parts.hostname
        or parts.query
        or parts.username
    ):
        raise ConfigError(f"--url {text!r} is not [http|https|grpc|grpcs://]host[:port][/path]")
    secure = scheme in ("https", "grpcs")
    return Address(parts.hostname, port or default_port, secure, parts.path.rstrip("/"))


def sampling_of(target: Target, request: BenchRequest) -> dict[str, Any]:
    """Sampling parameters of a request."""
    return {**target.sampling, "max_tokens": request.max_tokens}


class Backend(Protocol):
    """Requests to one server, on the event loop of one process."""

    def encode(self, request: BenchRequest, request_id: str) -> bytes:
        """The bytes of a request, made before the clock runs."""

    async def connect(self, users: int | None) -> None:
        """Open what `users` requests at once need, or some where there is no limit. Raises OSError."""

    def send(self, payload: bytes, request_id: str, record: RequestRecord) -> None:
        """Send it; what comes is noted in the record, whose `end` is called from the event loop, never from here."""

    async def close(self) -> None:
        """Cancel what runs and close the connections."""
