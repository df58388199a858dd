"""A span of each request that has ended, with one for each phase inside, exported by OTLP over HTTP.

Needs the packages of the extra `tracing`, so it is imported only where spans are asked for.
"""

import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from charonia.errors import ConfigError
from charonia.serving.request import GenerationRequest
from charonia.triton.request_record import RequestRecord

_EXPORT_TIMEOUT_S = 5
_FLUSH_TIMEOUT_MS = 5000
_PROPAGATOR = TraceContextTextMapPropagator()


class RequestTracer:
    """Makes spans of records; a batch processor, on a thread of its own, sends them and drops what it cannot hold.

    A request's span belongs to the trace that it came with, is left out where that one is not sampled, and begins a
    trace where there is none. Attributes are named as in vLLM's spans. Times come from the monotonic clock, laid over
    the wall clock as it is when the span is made.
    """

    def __init__(self, exporter: SpanExporter, *, model: str, version: str, instance: str) -> None:
        resource = Resource.create(
            {"service.name": "charonia", "service.instance.id": instance, "charonia.model.version": version}
        )
        self._model = model
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("charonia")

    @classmethod
    def over_http(cls, endpoint: str, *, model: str, version: str, instance: str) -> "RequestTracer":
        """Send spans to a collector. Raises `ConfigError` where `endpoint` is no HTTP address."""
        exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=_EXPORT_TIMEOUT_S)
        return cls(exporter, model=model, version=version, instance=instance)

    def __call__(self, record: RequestRecord) -> None:
        """Make the spans of a request."""
        clock = _WallClock()
        headers = record.generation.trace_headers if record.generation is not None else {}
        span = self._tracer.start_span(
            "llm_request",
            context=_PROPAGATOR.extract(headers),
            kind=SpanKind.SERVER,
            start_time=clock.nanoseconds(record.arrival),
            attributes=dict(_attributes(record, self._model)),
        )
        if record.error is not None:
            # The message may quote what the client sent.
            span.set_status(Status(StatusCode.ERROR, record.error.code.value))
            span.set_attribute("error.type", record.error.code.value)
        inside = set_span_in_context(span)
        for name, begin, end in _phases(record):
            phase = self._tracer.start_span(name, context=inside, start_time=clock.nanoseconds(begin))
            phase.end(clock.nanoseconds(end))
        span.end(clock.nanoseconds(record.ended))

    def stop(self) -> None:
        """Send what waits, for a few seconds at most."""
        self._provider.force_flush(_FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


class _WallClock:
    """Translates the monotonic clock."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, seconds: float) -> int:
        """Unix time in nanoseconds of a moment on the monotonic clock."""
        return self._offset + round(seconds * 1e9)


def traces_url(endpoint: str) -> str:
    """Where to post spans: `endpoint`, with OTLP's usual path where it has none. Raises `ConfigError`."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"engine setting 'otlp_traces_endpoint' must be an http or https address, got {endpoint!r}"
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def _phases(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end (monotonic seconds) of every phase that the request has been through."""
    timings, arrival = record.timings, record.arrival
    if not timings.first_token:
        return
    scheduled, first_token = arrival + timings.queue, arrival + timings.first_token
    yield "queue", arrival, scheduled
    yield "prefill", scheduled, first_token
    if timings.total > timings.first_token:
        yield "decode", first_token, arrival + timings.total


def _attributes(record: RequestRecord, model: str) -> Iterator[tuple[str, AttributeValue]]:
    timings = record.timings
    yield "gen_ai.response.model", model
    yield "gen_ai.request.id", record.request_id
    if isinstance(record.generation, GenerationRequest):
        params = record.generation.params
        yield "gen_ai.request.n", params.n
        yield "gen_ai.request.temperature", params.temperature
        yield "gen_ai.request.top_p", params.top_p
        if params.max_tokens is not None:
            yield "gen_ai.request.max_tokens", params.max_tokens
    yield "gen_ai.usage.num_sequences", record.num_sequences
    yield "gen_ai.usage.prompt_tokens", record.num_prompt_tokens
    yield "gen_ai.usage.cached_tokens", record.num_cached_tokens
    yield "gen_ai.usage.completion_tokens", record.num_generation_tokens
    yield "gen_ai.response.finish_reasons", list(record.finish_reasons)
    yield "gen_ai.latency.e2e", record.total_seconds
    if timings.first_token:
        yield "gen_ai.latency.time_in_queue", timings.queue
        yield "gen_ai.latency.time_to_first_token", timings.first_token
        yield "gen_ai.latency.time_in_model_prefill", timings.first_token - timings.queue
    if timings.total > timings.first_token:
        yield "gen_ai.latency.time_in_model_decode", record.decode_seconds
