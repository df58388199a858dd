"""Spans of requests: where they hang, how long they took, what they tell."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
from charonia.errors import ConfigError, RequestCancelledError
from charonia.outputs import RequestTimings
from charonia.sampling_params import SamplingParams
from charonia.serving.request import GenerationRequest
from charonia.triton.inputs import RawRequest, parse_request
from charonia.triton.request_record import RequestRecord
from charonia.triton.tracing import RequestTracer, traces_url
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.fake_pb import Request, text

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


def record(headers: dict[str, str] | None = None, **changes: Any) -> RequestRecord:
    now = time.monotonic()
    params = SamplingParams(max_tokens=9, temperature=0.5, n=2)
    values: dict[str, Any] = {
        "request_id": "r-1", "arrival": now - 2.0, "ended": now, "num_sequences": 2,
        "timings": RequestTimings(queue=0.25, first_token=0.5, total=1.75), "num_prompt_tokens": 7,
        "num_cached_tokens": 4, "num_generation_tokens": 18, "finish_reasons": ("stop", "length"),
        "generation": GenerationRequest(prompt="secret", params=params, trace_headers=headers or {}),
    }  # fmt: skip
    return RequestRecord(**values | changes)


def spans(*records: RequestRecord) -> dict[str, ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, model="llm", version="1", instance="llm_0_0")
    for entry in records:
        tracer(entry)
    tracer.stop()
    found: Sequence[ReadableSpan] = exporter.get_finished_spans()
    assert len({span.name for span in found}) == len(found)
    return {span.name: span for span in found}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_in_the_trace_that_it_came_with() -> None:
    found = spans(record(SAMPLED))
    assert set(found) == {"llm_request", "queue", "prefill", "decode"}
    root = found["llm_request"]
    assert root.kind is SpanKind.SERVER and root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "1"
    assert root.end_time == pytest.approx(time.time_ns(), abs=5e9)
    assert seconds(root) == pytest.approx(2.0)
    lengths = {"queue": 0.25, "prefill": 0.25, "decode": 1.25}
    for name, length in lengths.items():
        assert seconds(found[name]) == pytest.approx(length)
        assert found[name].parent == root.context
    assert found["queue"].start_time == root.start_time
    assert found["queue"].end_time == found["prefill"].start_time
    assert found["prefill"].end_time == found["decode"].start_time


def test_attributes() -> None:
    root = spans(record())["llm_request"]
    assert root.parent is None
    assert dict(root.attributes or {}) == {
        "gen_ai.response.model": "llm", "gen_ai.request.id": "r-1", "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0, "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.num_sequences": 2, "gen_ai.usage.prompt_tokens": 7, "gen_ai.usage.cached_tokens": 4,
        "gen_ai.usage.completion_tokens": 18, "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.latency.e2e": pytest.approx(2.0), "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_to_first_token": 0.5, "gen_ai.latency.time_in_model_prefill": 0.25,
        "gen_ai.latency.time_in_model_decode": 1.25,
    }  # fmt: skip
    assert root.resource.attributes["service.name"] == "charonia"


def test_a_request_that_never_ran() -> None:
    error = RequestCancelledError("secret")
    found = spans(record(SAMPLED, error=error, timings=RequestTimings(), generation=None))
    assert set(found) == {"llm_request"}
    root = found["llm_request"]
    assert root.status.status_code is StatusCode.ERROR
    assert (root.attributes or {})["error.type"] == "CANCELLED"
    assert "secret" not in root.to_json()


def test_what_others_chose_not_to_sample_is_left_out() -> None:
    assert spans(record({"traceparent": f"00-{TRACE}-{PARENT}-00"})) == {}
    assert spans(record({"traceparent": "nonsense"}))["llm_request"].parent is None


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
    ],
)
def test_endpoints(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector", "http://", ""])
def test_bad_endpoints(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        traces_url(endpoint)


def parse(parameters: str, trace_context: str | None = None, *, with_trace: bool = True) -> Any:
    request = Request({"text_input": text("a")}, parameters, trace_context=trace_context)
    return parse_request(RawRequest.take(request, with_trace=with_trace)).generation.trace_headers


def test_where_trace_context_comes_from() -> None:
    given = '{"traceparent": "00-a", "Tracestate": "b=1", "max_tokens": 3}'
    assert parse(given) == {"traceparent": "00-a", "tracestate": "b=1"}
    # The server's own span, where there is one, is the nearest.
    assert parse(given, '{"traceparent": "00-c"}') == {"traceparent": "00-c"}
    assert parse(given, '{"traceparent": "00-c"}', with_trace=False)["traceparent"] == "00-a"
    assert parse("{}") == {}
    # Tracing fails no request.
    assert parse('{"traceparent": 5, "tracestate": "' + "x" * 2000 + '"}') == {}
