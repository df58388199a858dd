"""Spans of the gateway's requests: their place in the client's trace, and what they hand on to the model."""

from typing import Any

import httpx
import pytest
from charonia_client.gateway.context import attach_context, context_of
from charonia_client.gateway.tracing import GatewayTracer, Trace
from fastapi import FastAPI, HTTPException, Request
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import ASGIApp, Receive, Scope, Send

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class AttachContext:
    """As much of the middleware outside as tracing needs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            attach_context(scope)
        await self._app(scope, receive, send)


async def ask(path: str, headers: dict[str, str] | None = None) -> tuple[Any, list[ReadableSpan]]:
    """A request's answer, and the spans that came of it."""
    exporter = InMemorySpanExporter()
    tracer = GatewayTracer(exporter)
    app = FastAPI()

    @app.get("/items/{name}")
    def item(name: str, request: Request) -> dict[str, str]:
        return dict(context_of(request).trace)

    @app.get("/broken")
    def broken() -> None:
        raise HTTPException(503)

    app.add_middleware(Trace, tracer=tracer)
    app.add_middleware(AttachContext)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.get(path, headers=headers)
    tracer.stop()
    return answer.json(), list(exporter.get_finished_spans())


async def test_the_models_spans_become_children() -> None:
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "x-request-id": "mine"}
    handed_on, [span] = await ask("/items/a", sent)
    assert span.parent is not None and span.kind is SpanKind.SERVER
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert handed_on == {
        "traceparent": f"00-{TRACE}-{span.context.span_id:016x}-01",
        "tracestate": "vendor=1",
    }
    assert span.name == "GET /items/{name}"
    assert dict(span.attributes or {}) == {
        "http.request.method": "GET", "url.path": "/items/a", "charonia.request.id": "mine",
        "http.route": "/items/{name}", "http.response.status_code": 200,
    }  # fmt: skip


async def test_without_a_trace_one_begins() -> None:
    handed_on, [span] = await ask("/items/a")
    assert span.parent is None
    assert handed_on["traceparent"].split("-")[1] == f"{span.context.trace_id:032x}"


async def test_a_trace_that_is_not_sampled_is_handed_on_as_such() -> None:
    handed_on, spans = await ask("/items/a", {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert spans == []
    version, trace, _, flags = handed_on["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "00")


async def test_failures() -> None:
    _, [span] = await ask("/broken")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["http.response.status_code"] == 503


def test_an_endpoint_that_is_no_http_address() -> None:
    with pytest.raises(ValueError, match="http or https"):
        GatewayTracer.over_http("localhost:4317")
