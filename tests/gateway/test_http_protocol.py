"""What a client may send besides bodies is bounded."""

import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from charonia_client.gateway.http_protocol import MAX_HEAD_BYTES
from charonia_client.gateway.settings import GatewaySettings
from support.gateway import running_gateway

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
KEY = b"authorization: Bearer k\r\n\r\n"


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    """A gateway that wants a key."""
    with running_gateway(GatewaySettings(triton="127.0.0.1:1", api_keys=("k",))) as url:
        yield url


def flood(url: str, start: bytes, piece: bytes) -> int:
    """Send pieces until the server hangs up; the bytes that it took."""
    sent = 0
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=20) as connection:
        try:
            connection.sendall(start)
            while sent < 64 << 20:
                connection.sendall(piece)
                sent += len(piece)
        except ConnectionError:
            pass
    return sent


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"a" * 4096),
        (b"GET / HTTP/1.1\r\nx: ", b"a" * 4096),
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 700),
        (POST + KEY + b"1;x=", b"a" * 4096),
        (POST + KEY + b"1\r\n{\r\n0\r\n", b"x: y\r\n" * 700),
    ],
    ids=["address", "header", "headers", "chunk extension", "trailers"],
)
def test_a_head_without_end_is_cut_off(closed, start, piece):
    # What has been sent waits in the buffers of both sockets as well.
    assert flood(closed, start, piece) < 32 << 20
    assert httpx.get(f"{closed}/version").status_code == 401


def test_the_answer_to_a_head_that_is_too_long(closed):
    start = b"GET / HTTP/1.1\r\nx: "
    with socket.create_connection(("127.0.0.1", httpx.URL(closed).port), timeout=20) as connection:
        connection.sendall(start + b"y" * (MAX_HEAD_BYTES + 1 - len(start)))
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 ") and b"too large" in answer


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nx: "], ids=["nothing", "half a head"])
def test_who_asks_for_nothing_is_cut_off(closed, monkeypatch, start):
    monkeypatch.setattr("charonia_client.gateway.http_protocol.HEAD_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", httpx.URL(closed).port), timeout=20) as connection:
        connection.sendall(start)
        assert connection.recv(1) == b""


def test_an_answer_may_take_longer_than_a_head(scripted, fake, monkeypatch):
    def slow(request):
        request.wait(1)
        yield "late"

    monkeypatch.setattr("charonia_client.gateway.http_protocol.HEAD_TIMEOUT_S", 0.3)
    fake.script = slow
    with running_gateway(GatewaySettings(triton=scripted.url)) as url, httpx.Client(base_url=url) as http:
        for _ in range(2):
            answer = http.post("/v1/completions", json={"prompt": "a"})
            assert answer.json()["choices"][0]["text"] == "late"
            time.sleep(0.6)


def test_long_heads_and_many_requests_on_one_connection(closed):
    with httpx.Client(base_url=closed, headers={"authorization": "Bearer k"}) as http:
        for _ in range(8):
            assert http.get("/version", headers={"x": "y" * (MAX_HEAD_BYTES // 2)}).status_code == 200


def test_a_body_in_many_small_chunks(closed):
    body = b'{"prompt": [' + b"1," * 5000 + b'"x"]}'
    pieces = (body[i : i + 2] for i in range(0, len(body), 2))
    headers = {"authorization": "Bearer k", "content-type": "application/json"}
    answer = httpx.post(f"{closed}/v1/completions", content=pieces, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "prompt" in answer.json()["error"]["message"]


def test_an_upgrade_is_no_way_past_the_key(closed):
    headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    assert httpx.get(f"{closed}/v1/models", headers=headers).status_code == 401
