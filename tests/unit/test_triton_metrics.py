"""Custom metrics: what is counted, who exports it, and that the hot path never calls Triton."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from charonia.core.stats import EngineStats
from charonia.errors import InvalidRequestError, RequestCancelledError
from charonia.outputs import CompletionOutput, FinishReason, RequestOutput, RequestTimings
from charonia.triton import metrics_export
from charonia.triton.inputs import ResponseOptions
from charonia.triton.live_request import LiveRequest
from charonia.triton.metrics_export import ExclusiveFile, FrontendCounters, MetricsExporter
from charonia.triton.pb import TritonUtils
from support import fake_pb
from support.fake_pb import Metric, MetricFamily, Sender

LABELS = {"model": "llm", "version": "1"}


@pytest.fixture(autouse=True)
def quick_pushes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics_export, "PUSH_PERIOD_S", 0.02)
    MetricFamily.known.clear()
    yield
    MetricFamily.known.clear()


def series(name: str, **labels: str) -> Metric | None:
    family = MetricFamily.known.get(name)
    found = [metric for metric in family.metrics if metric.labels == LABELS | labels] if family else []
    assert len(found) <= 1
    return found[0] if found else None


def value(name: str, **labels: str) -> float | None:
    metric = series(name, **labels)
    return None if metric is None else metric.value


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def request(num_tokens: int = 0, *, submitted: bool = True) -> LiveRequest:
    live = LiveRequest(Sender(), lambda _: None)
    live.submitted = submitted
    if num_tokens:
        live.start(ResponseOptions(), 1)
        assert live.assembler is not None
        item = CompletionOutput(0, "x", list(range(num_tokens)), finish_reason=FinishReason.LENGTH)
        timings = RequestTimings(queue=0.5, first_token=1.0, total=3.0)
        live.assembler.add(RequestOutput("r", "p", [1, 2, 3], [item], True, timings=timings))
    return live


def exporter(
    tmp_path: Path, counters: FrontendCounters, stats: Callable[[], EngineStats] = EngineStats
) -> MetricsExporter:
    return MetricsExporter(
        TritonUtils(fake_pb), counters, stats, labels=LABELS, lock_path=tmp_path / "metrics.lock"
    )


def test_requests_are_counted_by_outcome(tmp_path: Path) -> None:
    counters = FrontendCounters()
    pushing = exporter(tmp_path, counters)
    done = request(5)
    counters.closed(done, None, done.arrival + 3.0)
    counters.closed(request(), RequestCancelledError("gone"), 0.0)
    counters.closed(request(submitted=False), RequestCancelledError("gone"), 0.0)
    counters.closed(request(submitted=False), InvalidRequestError("bad"), 0.0)
    pushing.stop()
    assert value("charonia_requests_total", outcome="length") == 1
    assert value("charonia_requests_total", outcome="cancelled") == 2
    assert value("charonia_requests_refused_total", code="INVALID_ARG") == 1
    assert value("charonia_prompt_tokens_total") == 3
    assert value("charonia_generation_tokens_total") == 5
    histograms = {
        "charonia_queue_seconds": 0.5, "charonia_time_to_first_token_seconds": 1.0, "charonia_request_seconds": 3.0,
        "charonia_inter_token_latency_seconds": 0.5,
    }  # fmt: skip
    for name, seconds in histograms.items():
        metric = series(name)
        assert metric is not None
        assert metric.observations == [pytest.approx(seconds)]
        assert metric.buckets == sorted(metric.buckets or [])


def test_one_instance_exports_the_engine_and_another_takes_over(tmp_path: Path) -> None:
    stats = EngineStats(
        num_running=2, num_waiting=1, kv_blocks_used=25, kv_blocks_total=100, block_size=16,
        prefix_cache_queries=10, prefix_cache_hits=4, preemptions=1,
    )  # fmt: skip
    first = exporter(tmp_path, FrontendCounters(), lambda: stats)
    eventually(lambda: value("charonia_kv_cache_usage_ratio") == 0.25)
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 25
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") == 100
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="tokens_per") == 16
    time.sleep(0.1)
    assert value("charonia_prefix_cache_hits_total") == 4
    asked: list[int] = []

    def second_stats() -> EngineStats:
        asked.append(1)
        return stats

    second = exporter(tmp_path, FrontendCounters(), second_stats)
    time.sleep(0.1)
    assert asked == []
    first.stop()
    eventually(lambda: asked)
    second.stop()


def test_counters_survive_an_engine_that_starts_over(tmp_path: Path) -> None:
    stats = EngineStats(preemptions=7)
    pushing = exporter(tmp_path, FrontendCounters(), lambda: stats)
    eventually(lambda: value("charonia_preemptions_total") == 7)
    stats.preemptions = 2
    eventually(lambda: value("charonia_preemptions_total") == 9)
    stats.preemptions = 3
    eventually(lambda: value("charonia_preemptions_total") == 10)
    pushing.stop()


def test_a_server_without_metrics_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricFamily, "disabled", True)
    pushing = exporter(tmp_path, FrontendCounters())
    pushing.stop()
    assert MetricFamily.known == {}


def test_every_name_has_our_prefix_or_is_the_one_triton_reads(tmp_path: Path) -> None:
    exporter(tmp_path, FrontendCounters()).stop()
    assert MetricFamily.known
    for name, family in MetricFamily.known.items():
        assert name.startswith("charonia_") or name == "nv_trt_llm_kv_cache_block_metrics"
        assert family.description


def test_the_lock_goes_to_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = ExclusiveFile(tmp_path / "lock"), ExclusiveFile(tmp_path / "lock")
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    assert not first.acquire()
    second.release()
    assert not (tmp_path / "lock").exists()
