"""A span of each HTTP request, exported by OTLP over HTTP; the model's spans become its children.

Needs the packages of the extra `tracing`, so it is imported only where spans are asked for.
"""

from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from charonia_client.gateway.context import context_in, replace_trace

_EXPORT_TIMEOUT_S = 5
_FLUSH_TIMEOUT_MS = 5000
_PROPAGATOR = TraceContextTextMapPropagator()


class GatewayTracer:
    """Makes the spans; a batch processor, on a thread of its own, sends them and drops what it cannot hold.

    A request's span belongs to the trace of its `traceparent` header, is left out where that one is not sampled, and
    begins a trace where there is none.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "charonia-gateway"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("charonia_client.gateway")

    @classmethod
    def over_http(cls, endpoint: str) -> "GatewayTracer":
        """Send spans to a collector (`http://host:4318`). Raises ValueError where `endpoint` is no HTTP address."""
        return cls(OTLPSpanExporter(endpoint=_traces_url(endpoint), timeout=_EXPORT_TIMEOUT_S))

    def start(self, scope: Scope) -> Span:
        """Begin the span of a request whose context is attached, and make it the parent of what comes after."""
        context = context_in(scope)
        span = self._tracer.start_span(
            scope["method"],
            context=_PROPAGATOR.extract(context.trace),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "charonia.request.id": context.request_id,
            },
        )
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, set_span_in_context(span))
        replace_trace(scope, headers)
        return span

    def stop(self) -> None:
        """Send what waits, for a few seconds at most; blocks."""
        self._provider.force_flush(_FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


class Trace:
    """ASGI middleware that spans each request up to the last byte of its answer. It comes inside of `Observe`."""

    def __init__(self, app: ASGIApp, *, tracer: GatewayTracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        span = self._tracer.start(scope)

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                span.add_event("response started")
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            _finish(span, scope, status)


def _finish(span: Span, scope: Scope, status: int) -> None:
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
        span.set_attribute("error.type", str(status))
    span.end()


def _traces_url(endpoint: str) -> str:
    """Where to post spans: `endpoint`, with OTLP's usual path where it has none."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the endpoint for traces must be an http or https address, got {endpoint!r}")
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
