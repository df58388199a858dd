"""gRPC streams over TLS and IPv6."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from charonia_client import AsyncCharoniaClient, ServerUnavailableError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and its self-signed certificate, for the name localhost."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("the program openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, "req", "-x509", *curve, *names, *files], check=True, capture_output=True)
    return key, certificate


@pytest.fixture
def trusted(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is one of the system's authorities."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))


@pytest.fixture
def tls_echo(certificate: tuple[Path, Path], scripted_grpc: Callable[..., Any], answers: Any) -> int:
    """The port of a gRPC server that answers over TLS, with the length of what it was sent."""

    def script(number: int, requests: Any, context: Any) -> Any:
        for request in requests:
            size = sum(map(len, request.raw_input_contents))
            yield answers.content(request, "x" * size, final=True)

    key, chain = (path.read_bytes() for path in certificate)
    server = scripted_grpc(script, credentials=grpc.ssl_server_credentials([(key, chain)]))
    return int(server.url.rpartition(":")[2])


@asynccontextmanager
async def listening(tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    """The port of a server that takes connections and says nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1000):
                pass
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.usefixtures("trusted")
async def test_tls(tls_echo: int) -> None:
    async with AsyncCharoniaClient(f"grpcs://localhost:{tls_echo}", retries=0) as client:
        results = await asyncio.gather(*(client.generate("a" * 1000) for _ in range(8)))
        assert all(len(each.text) > 1000 for each in results)
        # More than the windows of HTTP/2 and the records of TLS hold at once, in both directions.
        assert len((await client.generate("a" * 3_000_000)).text) > 3_000_000


async def test_a_certificate_that_nobody_vouches_for(tls_echo: int) -> None:
    async with AsyncCharoniaClient(f"grpcs://localhost:{tls_echo}", retries=0) as client:
        with pytest.raises(ServerUnavailableError, match=r"no TLS connection.*CERTIFICATE_VERIFY_FAILED"):
            await client.generate("x")


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_for_another_name(tls_echo: int) -> None:
    async with AsyncCharoniaClient(f"grpcs://127.0.0.1:{tls_echo}", retries=0) as client:
        with pytest.raises(ServerUnavailableError, match="no TLS connection"):
            await client.generate("x")


@pytest.mark.usefixtures("trusted")
async def test_tls_without_http2(certificate: tuple[Path, Path]) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate[1], certificate[0])
    async with listening(tls) as port, AsyncCharoniaClient(f"grpcs://localhost:{port}", retries=0) as client:
        with pytest.raises(ServerUnavailableError, match="does not offer HTTP/2"):
            await client.generate("x")


async def test_tls_to_a_server_without_it(scripted_grpc: Callable[..., Any]) -> None:
    server = scripted_grpc(lambda number, requests, context: iter(()))
    async with AsyncCharoniaClient(f"grpcs://{server.url}", retries=0) as client:
        with pytest.raises(ServerUnavailableError):
            await client.generate("x")


async def test_ipv6(scripted_grpc: Callable[..., Any], answers: Any) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this host has no IPv6: {error}")

    def script(number: int, requests: Any, context: Any) -> Any:
        for request in requests:
            yield answers.content(request, context.peer(), final=True)

    server = scripted_grpc(script, host="[::1]")
    async with AsyncCharoniaClient(server.url, retries=0) as client:
        assert client.url == server.url
        assert "::1" in (await client.generate("x")).text.replace("%3A", ":")


async def test_a_host_name_that_is_none() -> None:
    async with AsyncCharoniaClient("a..b:8001", retries=0) as client:
        with pytest.raises(ServerUnavailableError, match=r"a\.\.b"):
            await client.generate("x")
