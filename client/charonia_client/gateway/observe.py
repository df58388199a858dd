"""Request ids and the gateway's own metrics; the model's are on Triton's port."""

import logging
import time

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from charonia_client.gateway.context import attach_context
from charonia_client.gateway.errors import as_api_error

logger = logging.getLogger("charonia.gateway")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_NO_ROUTE = "unmatched"
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class GatewayMetrics:
    """Requests by route, method and status, in flight, and durations up to the last byte."""

    def __init__(self, shared_dir: str | None = None) -> None:
        """shared_dir: where worker processes keep their numbers, so that each can tell the sum; None for one alone."""
        self.registry = CollectorRegistry()
        self._shared_dir = shared_dir
        self.requests = Counter(
            "charonia_gateway_requests",
            "Requests answered; status 499 is a client that left",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "charonia_gateway_requests_in_flight",
            "Requests being answered",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.seconds = Histogram(
            "charonia_gateway_request_seconds",
            "From a request's headers to the last byte of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_byte_seconds = Histogram(
            "charonia_gateway_first_byte_seconds",
            "From a request's headers to the status line of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )

    def exposition(self) -> bytes:
        """The metrics of all worker processes in Prometheus' text form."""
        if self._shared_dir is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=self._shared_dir)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class Observe:
    """ASGI middleware that gives each request its context, answers with its id, and counts it.

    It answers what fails unexpectedly, too, so that there is an id to look for in the log.
    """

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = attach_context(scope).request_id.encode()
        started = time.monotonic()
        status = 500
        first_byte: float | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status = message["status"]
                first_byte = time.monotonic() - started
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, noting_send)
        except Exception as error:
            if first_byte is not None:
                raise
            logger.exception("request %s: %s %r", request_id.decode(), scope["method"], scope["path"])
            await as_api_error(error).response()(scope, receive, noting_send)
        finally:
            self._metrics.in_flight.dec()
            route = _route(scope)
            if scope.get("charonia.disconnected"):
                status = 499
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - started)
            if first_byte is not None:
                self._metrics.first_byte_seconds.labels(route).observe(first_byte)


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", None) or _NO_ROUTE


def metrics_routes(metrics: GatewayMetrics) -> APIRouter:
    """GET /metrics."""
    router = APIRouter()

    @router.get("/metrics", summary="The gateway's metrics, for Prometheus")
    def read_metrics() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
