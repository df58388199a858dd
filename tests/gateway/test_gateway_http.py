"""What holds for every route: keys, ids, errors, limits, disconnects, metrics."""

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import pytest
from charonia_client.gateway.app import create_app
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.tracing import GatewayTracer
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from support.fake_triton import ModelError, echo
from support.gateway import running_gateway
from support.launch import eventually

CHAT = {"messages": [{"role": "user", "content": "a b c"}]}


@pytest.fixture
def http(gateway_url, fake) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway_url) as client:
        yield client


@pytest.fixture(scope="module")
def closed_url(scripted) -> Iterator[str]:
    """A gateway with keys, a page for everybody, a short time limit, a small body limit and a friend."""
    settings = GatewaySettings(
        triton=scripted.url,
        served_model_names=("first", "second"),
        api_keys=("key-one", "key-two"),
        tool_parser=None,
        reasoning_parser=None,
        allowed_origins=("https://friend.example",),
        max_body_bytes=10_000,
        request_timeout_s=0.3,
        open_chat_page=True,
    )
    with running_gateway(settings) as url:
        yield url


@pytest.fixture
def closed(closed_url, fake) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=closed_url) as client:
        yield client


def all_routes():
    paths = create_app(GatewaySettings(triton="127.0.0.1:1")).openapi()["paths"]
    documented = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return [*documented, ("GET", "/openapi.json"), ("GET", "/docs"), ("PUT", "/v1/models")]


def test_every_route_but_health_wants_a_key(closed):
    routes = all_routes()
    assert len(routes) > 10
    for method, path in routes:
        if path == "/health":
            continue
        answer = closed.request(method, path.replace("{name}", "x"))
        assert answer.status_code == 401, (method, path)
        assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
    assert closed.get("/no/such/route").status_code == 401
    assert closed.get("/health").status_code == 200
    assert closed.head("/health").status_code == 200
    assert closed.post("/health").status_code == 401


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer key-one", 200),
        ("bearer  key-two", 200),
        ("Bearer key", 401),
        ("Basic key-one", 401),
        ("key-one", 401),
        ("Bearer", 401),
    ],
)
def test_keys(closed, header, status):
    assert closed.get("/v1/models", headers={"authorization": header}).status_code == status


def test_the_page_may_be_open(closed, http):
    assert closed.get("/").status_code == 200
    assert closed.get("/chat/style.css").status_code == 200
    assert closed.post("/").status_code == 401
    closed_page = create_app(GatewaySettings(triton="127.0.0.1:1", api_keys=("k",)))
    transport = httpx.ASGITransport(closed_page)

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return (await client.get("/")).status_code

    assert asyncio.run(ask()) == 401


def test_served_names(closed):
    headers = {"authorization": "Bearer key-one"}
    assert [m["id"] for m in closed.get("/v1/models", headers=headers).json()["data"]] == ["first", "second"]
    answer = closed.post("/v1/chat/completions", json={**CHAT, "model": "second"}, headers=headers)
    assert answer.json()["model"] == "second"
    assert (
        closed.post("/v1/chat/completions", json={**CHAT, "model": "llm"}, headers=headers).status_code == 404
    )


def test_other_origins(closed, http):
    origin = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    assert (
        closed.options("/v1/models", headers=origin).headers["access-control-allow-origin"]
        == origin["origin"]
    )
    stranger = {**origin, "origin": "https://stranger.example"}
    assert "access-control-allow-origin" not in closed.options("/v1/models", headers=stranger).headers
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=origin).headers


def test_large_bodies(closed):
    headers = {"authorization": "Bearer key-one", "content-type": "application/json"}
    body = json.dumps({**CHAT, "padding": "x" * 20_000}).encode()
    answer = closed.post("/v1/chat/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))
    assert closed.post("/v1/chat/completions", content=pieces, headers=headers).status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_a_time_limit(closed, fake, stream):
    def slow(request):
        request.wait(10)
        yield "late"
        yield "later"

    fake.script = slow
    started = time.monotonic()
    headers = {"authorization": "Bearer key-one"}
    answer = closed.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers)
    assert answer.status_code == 504
    assert time.monotonic() - started < 3
    assert fake.last.parameters["timeout"] == 300_000
    assert eventually(lambda: fake.last.id in fake.cancelled, 2)


def test_health_follows_the_model(http, fake):
    assert http.get("/health").status_code == 200
    fake.ready = False
    answer = http.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


def test_nobody_behind_it():
    with running_gateway(GatewaySettings(triton="127.0.0.1:1")) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert "127.0.0.1" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nope", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[1]", 400),
        ("POST", "/v1/chat/completions", b"[" * 5000, 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400),
        ("POST", "/v1/embeddings", b'{"input": "a", "dimensions": 0}', 400),
    ],
)
def test_errors_have_the_form_of_openai(http, method, path, body, status):
    answer = http.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_another_type(http):
    answer = http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_request_ids(http, fake):
    answer = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "chatcmpl-mine-1"
    assert fake.last.id == "mine-1"
    for unusable in ("a b", "x" * 200, "é"):
        own = http.get("/version", headers={"x-request-id": unusable.encode()}).headers["x-request-id"]
        assert own != unusable
        assert len(own) == 32


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_is_found_in_the_log_by_its_id(http, fake, caplog, stream):
    def fail(request):
        yield "one"
        yield " two"
        raise ModelError("[INTERNAL] internal error; the server's log has the details")

    fake.script = fail
    answer = http.post(
        "/v1/chat/completions", json={**CHAT, "stream": stream}, headers={"x-request-id": "mine-2"}
    )
    assert "internal error" in answer.text
    assert [r for r in caplog.records if "mine-2" in r.getMessage() and "internal error" in r.getMessage()]


def test_a_fault_of_the_gateway(http, fake, caplog, monkeypatch):
    def fail(*args):
        raise RuntimeError("a secret")

    monkeypatch.setattr("charonia_client.gateway.routes.models._card", fail)
    answer = http.get("/v1/models", headers={"x-request-id": "mine-3"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-3")
    assert answer.json()["error"]["type"] == "internal_error" and "secret" not in answer.text
    (record,) = [r for r in caplog.records if "mine-3" in r.getMessage()]
    assert record.exc_info is not None and "a secret" in str(record.exc_info[1])


def test_the_trace_goes_on(http, fake):
    trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "a=b"}
    http.post("/v1/chat/completions", json=CHAT, headers=trace)
    assert {name: fake.last.parameters.get(name) for name in trace} == trace
    http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": "nonsense"})
    assert "traceparent" not in fake.last.parameters


@pytest.mark.parametrize("body", [{}, {"stream": True}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_cancels_its_request(http, fake, path, body):
    def endless(request):
        for word in range(10_000):
            request.wait(0.005)
            if request.is_cancelled():
                return
            yield f"{word} "

    fake.script = endless
    subject = CHAT if "chat" in path else {"prompt": ["a", "b"]}
    if body:
        with http.stream("POST", path, json={**subject, **body}) as answer:
            for _, _line in zip(range(6), answer.iter_lines(), strict=False):
                pass
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post(path, json=subject, timeout=0.3)
    http.close()
    closed_at = time.monotonic()
    wanted = 1 if "chat" in path else 2
    assert eventually(lambda: len(fake.cancelled) == wanted, 5)
    assert max(fake.cancelled.values()) - closed_at < 0.5


def test_neighbours_of_a_client_that_leaves_go_on(http, gateway_url, fake):
    def script(request):
        for word in echo(request):
            request.wait(0.05)
            yield word

    fake.script = script

    async def run():
        async with httpx.AsyncClient(base_url=gateway_url) as client:
            leaving = asyncio.create_task(
                client.post("/v1/completions", json={"prompt": "x " * 200, "max_tokens": 200})
            )
            staying = asyncio.create_task(client.post("/v1/completions", json={"prompt": "y " * 12}))
            await asyncio.sleep(0.2)
            leaving.cancel()
            return await staying

    answer = asyncio.run(run())
    assert answer.json()["choices"][0]["text"] == ("y " * 12).strip()
    assert len(fake.cancelled) == 1


def test_metrics(http, fake):
    http.post("/v1/chat/completions", json=CHAT)
    http.get("/nope")
    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    requests = {
        (s.labels["route"], s.labels["status"]): s.value
        for s in families["charonia_gateway_requests"].samples
        if s.name.endswith("_total")
    }
    assert requests["/v1/chat/completions", "200"] >= 1
    assert requests["unmatched", "404"] >= 1
    assert families["charonia_gateway_requests_in_flight"].samples[0].value == 1
    assert "charonia_gateway_request_seconds" in families


def test_version_and_page(http):
    assert http.get("/version").json()["version"]
    assert http.get("/").headers["content-type"].startswith("text/html")


def test_a_request_is_a_span(scripted, fake, monkeypatch):
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(GatewayTracer, "over_http", lambda endpoint: GatewayTracer(exporter))
    trace_id = "ab" * 16
    settings = GatewaySettings(triton=scripted.url, otlp_traces_endpoint="http://127.0.0.1:1")
    with running_gateway(settings) as url:
        sent = {"traceparent": f"00-{trace_id}-{'cd' * 8}-01"}
        httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=sent)
        handed_on = fake.last.parameters["traceparent"]
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions"
    assert handed_on == f"00-{trace_id}-{span.context.span_id:016x}-01"


@pytest.mark.parametrize(
    "wrong",
    [
        {"otlp_traces_endpoint": "nope"},
        {"tool_parser": "nope"},
        {"reasoning_parser": "nope"},
        {"triton": "http://localhost:8000"},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=r"nope|gRPC"):
        create_app(GatewaySettings(**wrong))
