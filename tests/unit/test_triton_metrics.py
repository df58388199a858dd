"""Custom metrics: what is counted, who exports it, and that it costs no more than it may."""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from charonia.core.stats import EngineStats
from charonia.errors import InvalidRequestError, QueueFullError, RequestCancelledError
from charonia.outputs import CompletionOutput, FinishReason, RequestOutput, RequestTimings
from charonia.request import TokenDelta
from charonia.serving.metrics import TokenMeter
from charonia.serving.request import GenerationRequest
from charonia.triton import metrics_export
from charonia.triton.exclusive_file import ExclusiveFile
from charonia.triton.inputs import ParsedRequest, ResponseOptions
from charonia.triton.live_request import LiveRequest
from charonia.triton.metric_families import buckets_1_2_5
from charonia.triton.metrics_export import MAX_INTER_TOKEN_OBSERVATIONS_PER_S, MetricsExporter
from charonia.triton.outputs import ResponseAssembler
from charonia.triton.pb import TritonUtils
from charonia.triton.request_counters import RequestCounters
from charonia.triton.request_record import RequestRecord
from support import fake_pb
from support.fake_pb import Metric, MetricFamily, Sender

LABELS = {"model": "llm", "version": "1"}

# As in src/utils/metrics.py of Triton's vLLM backend, for a context length of 100.
VLLM_COUNTERS = {"vllm:prompt_tokens_total", "vllm:generation_tokens_total"}
VLLM_BUCKETS = {
    "vllm:time_to_first_token_seconds": [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    ],
    "vllm:time_per_output_token_seconds": [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    ],
    "vllm:e2e_request_latency_seconds": [
        0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
        1920.0, 7680.0,
    ],
    "vllm:request_prompt_tokens": [1, 2, 5, 10, 20, 50, 100],
    "vllm:request_generation_tokens": [1, 2, 5, 10, 20, 50, 100],
    "vllm:request_params_n": [1, 2, 5, 10, 20],
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick_pushes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics_export, "PUSH_PERIOD_S", 0.02)
    monkeypatch.setattr(metrics_export, "MIN_PUSH_PERIOD_S", 0.01)
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


def observations(name: str) -> list[float]:
    metric = series(name)
    assert metric is not None and metric.buckets == sorted(metric.buckets or [])
    return metric.observations


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def record(num_tokens: int = 0, *, error: Exception | None = None, submitted: bool = True) -> RequestRecord:
    live = LiveRequest(Sender(), lambda _: None)
    live.submitted = submitted
    if num_tokens:
        live.start(ParsedRequest(GenerationRequest(prompt="p"), ResponseOptions()))
        assert isinstance(live.assembler, ResponseAssembler)
        item = CompletionOutput(0, "x", list(range(num_tokens)), finish_reason=FinishReason.LENGTH)
        timings = RequestTimings(queue=0.5, first_token=1.0, total=3.0)
        live.assembler.add(RequestOutput("r", "p", [1, 2, 3], [item], True, timings=timings))
    return RequestRecord.of(live, error, live.arrival + 3.5)


class Engine:
    """As much of an engine's client as the exporter asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.stats = stats
        self.meter = TokenMeter()
        self.is_ready = True


class Frontend:
    """What an instance counts, and the thread that exports it."""

    def __init__(
        self, folder: Path, stats: Callable[[], EngineStats] = EngineStats, vllm: int | None = None
    ) -> None:
        self.engine, self.counters = Engine(stats), RequestCounters()
        self.meter = self.engine.meter
        self.exporter = MetricsExporter(
            TritonUtils(fake_pb), self.engine, self.counters,
            labels=LABELS, lock_path=folder / "metrics.lock", vllm_max_model_len=vllm,
        )  # fmt: skip

    def serve_one(self, num_tokens: int = 5, step_s: float = 0.03) -> None:
        """A request of 3 prompt tokens, one token a step."""
        self.meter.note_first_token(RequestTimings(queue=0.5, first_token=1.0), 3)
        for i in range(num_tokens):
            reason = FinishReason.LENGTH if i == num_tokens - 1 else None
            self.meter.note_step(
                [TokenDelta(request_id=1, token_ids=[9], finish_reason=reason)], 1 + step_s * i
            )
        self.counters.note(record(num_tokens))


def test_requests_are_counted_by_outcome(tmp_path: Path) -> None:
    frontend = Frontend(tmp_path)
    eventually(lambda: value("charonia_requests_total", outcome="length") == 0)
    frontend.serve_one(5)
    frontend.counters.note(record(error=RequestCancelledError("gone")))
    frontend.counters.note(record(error=RequestCancelledError("gone"), submitted=False))
    frontend.counters.note(record(error=InvalidRequestError("bad"), submitted=False))
    frontend.counters.note(record(error=QueueFullError("full")))
    frontend.exporter.stop()
    assert value("charonia_requests_total", outcome="length") == 1
    assert value("charonia_requests_total", outcome="cancelled") == 2
    assert value("charonia_requests_total", outcome="unavailable") == 0
    assert value("charonia_requests_refused_total", code="INVALID_ARG") == 1
    assert value("charonia_requests_refused_total", code="UNAVAILABLE") == 1
    assert value("charonia_prompt_tokens_total") == 3
    assert value("charonia_generation_tokens_total") == 5
    histograms = {
        "charonia_queue_seconds": 0.5, "charonia_time_to_first_token_seconds": 1.0, "charonia_prefill_seconds": 0.5,
        "charonia_decode_seconds": 2.0, "charonia_request_seconds": 3.5,
    }  # fmt: skip
    for name, seconds in histograms.items():
        assert observations(name) == [pytest.approx(seconds)]


def test_time_between_tokens_is_exported_as_the_sums_of_a_histogram(tmp_path: Path) -> None:
    frontend = Frontend(tmp_path)
    for _ in range(2):
        frontend.serve_one(5, step_s=0.03)
    frontend.serve_one(2, step_s=0.2)
    frontend.exporter.stop()
    name = "charonia_inter_token_latency_seconds"
    buckets = {metric.labels["le"]: metric.value for metric in MetricFamily.known[name + "_bucket"].metrics}
    assert buckets["0.025"] == 0
    assert buckets["0.035"] == buckets["0.15"] == 8
    assert buckets["0.2"] + 1 == buckets["0.3"] == 9 or buckets["0.2"] == 9
    assert buckets["10"] == buckets["+Inf"] == value(name + "_count") == 9
    assert value(name + "_sum") == pytest.approx(8 * 0.03 + 0.2)


def test_without_being_asked_for_no_vllm_name_is_declared(tmp_path: Path) -> None:
    frontend = Frontend(tmp_path)
    frontend.serve_one()
    frontend.exporter.stop()
    assert MetricFamily.known
    for name, family in MetricFamily.known.items():
        assert name.startswith("charonia_") or name == "nv_trt_llm_kv_cache_block_metrics"
        assert family.description


def test_the_vllm_backends_metrics(tmp_path: Path) -> None:
    frontend = Frontend(tmp_path, vllm=100)
    frontend.serve_one(5)
    frontend.serve_one(4)
    frontend.exporter.stop()
    families = {name: f for name, f in MetricFamily.known.items() if name.startswith("vllm:")}
    assert {name for name, f in families.items() if f.kind == MetricFamily.COUNTER} == VLLM_COUNTERS
    histograms = {name: f for name, f in families.items() if f.kind == MetricFamily.HISTOGRAM}
    assert {name: f.metrics[0].buckets for name, f in histograms.items()} == VLLM_BUCKETS
    assert len(families) == len(VLLM_COUNTERS) + len(VLLM_BUCKETS)
    assert all([m.labels for m in family.metrics] == [LABELS] for family in families.values())
    assert value("vllm:prompt_tokens_total") == 6
    assert value("vllm:generation_tokens_total") == 9
    assert observations("vllm:time_to_first_token_seconds") == [1.0, 1.0]
    # One for each token but the first ones.
    assert observations("vllm:time_per_output_token_seconds") == [pytest.approx(0.03)] * 7
    assert observations("vllm:e2e_request_latency_seconds") == [pytest.approx(3.5)] * 2
    assert observations("vllm:request_prompt_tokens") == [3, 3]
    assert observations("vllm:request_generation_tokens") == [5, 4]
    assert observations("vllm:request_params_n") == [1, 1]


def test_a_flood_of_tokens_makes_no_flood_of_observations(tmp_path: Path) -> None:
    frontend = Frontend(tmp_path, vllm=100)
    frontend.exporter.stop()
    MetricFamily.known.clear()
    frontend = Frontend(tmp_path, vllm=100)
    deltas = [TokenDelta(request_id=i, token_ids=[1]) for i in range(1000)]
    with frontend.meter._lock:  # one push for them all
        counts = frontend.meter._counts
        for wait, times in ((0.02, 30_000), (0.3, 10_000)):
            counts.inter_token.observe(wait, times)
        counts.generation_tokens += 40 * len(deltas)
    frontend.exporter.stop()
    seen = observations("vllm:time_per_output_token_seconds")
    assert len(seen) == pytest.approx(MAX_INTER_TOKEN_OBSERVATIONS_PER_S, abs=2)
    assert sum(s == pytest.approx(0.02) for s in seen) == pytest.approx(3 * len(seen) / 4, abs=2)
    assert value("vllm:generation_tokens_total") == 40_000
    assert value("charonia_inter_token_latency_seconds_count") == 40_000


def test_one_instance_exports_the_engine_and_another_takes_over(tmp_path: Path) -> None:
    stats = EngineStats(
        num_running=2, num_waiting=1, kv_blocks_used=25, kv_blocks_total=100, block_size=16,
        prefix_cache_queries=10, prefix_cache_hits=4, preemptions=1,
    )  # fmt: skip
    stats.note_step(num_tokens=64, num_sequences=3)
    stats.step_seconds.observe(0.02)
    first = Frontend(tmp_path, lambda: stats)
    eventually(lambda: value("charonia_kv_cache_usage_ratio") == 0.25)
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 25
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") == 100
    assert value("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="tokens_per") == 16
    time.sleep(0.1)
    assert value("charonia_prefix_cache_hits_total") == 4
    assert value("charonia_step_tokens_sum") == 64
    assert value("charonia_step_sequences_bucket", le="2") == 0
    assert value("charonia_step_sequences_bucket", le="4") == 1
    assert value("charonia_step_seconds_count") == 1
    asked: list[int] = []

    def second_stats() -> EngineStats:
        asked.append(1)
        return stats

    of_first = dict(MetricFamily.known)
    second = Frontend(tmp_path, second_stats)

    def total(name: str) -> float:
        """What the server shows: the sum of all that its instances have added, those that have gone too."""
        return of_first[name].metrics[0].value + (value(name) or 0.0)

    time.sleep(0.1)
    assert asked == []
    first.exporter.stop()
    eventually(lambda: len(asked) > 1)
    # What the first has pushed is in the server for good.
    stats.preemptions += 2
    stats.note_step(num_tokens=6, num_sequences=3)
    eventually(lambda: total("charonia_preemptions_total") == 3)
    assert total("charonia_prefix_cache_hits_total") == 4
    eventually(lambda: total("charonia_step_tokens_sum") == 70)
    assert total("charonia_step_seconds_count") == 1
    second.exporter.stop()


def test_counters_survive_an_engine_that_starts_over(tmp_path: Path) -> None:
    engines = [EngineStats(preemptions=7)]
    frontend = Frontend(tmp_path, lambda: engines[-1])
    eventually(lambda: value("charonia_preemptions_total") == 7)
    assert value("charonia_engine_ready") == 1
    frontend.engine.is_ready = False
    eventually(lambda: value("charonia_engine_ready") == 0)
    engines.append(EngineStats(preemptions=2))
    eventually(lambda: value("charonia_preemptions_total") == 9)
    engines[-1].preemptions = 3
    eventually(lambda: value("charonia_preemptions_total") == 10)
    # One that has counted further than the one before, between two pushes.
    engines.append(EngineStats(preemptions=5))
    eventually(lambda: value("charonia_preemptions_total") == 15)
    frontend.exporter.stop()


def test_a_request_that_ends_is_exported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_export, "PUSH_PERIOD_S", 60.0)
    frontend = Frontend(tmp_path)
    frontend.counters.note(record(3))
    frontend.exporter.nudge()
    eventually(lambda: value("charonia_requests_total", outcome="length") == 1)
    frontend.exporter.stop()


def test_a_server_without_metrics_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricFamily, "disabled", True)
    frontend = Frontend(tmp_path, vllm=100)
    frontend.exporter.nudge()
    frontend.exporter.stop()
    assert MetricFamily.known == {}


def test_buckets_of_lengths() -> None:
    assert buckets_1_2_5(8192) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    assert buckets_1_2_5(1) == (1,)


def test_the_lock_goes_to_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = ExclusiveFile(tmp_path / "lock"), ExclusiveFile(tmp_path / "lock")
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    assert not first.acquire()
    assert second.read() == b""
    second.write(b"something long")
    second.write(b"short")
    second.release()
    assert first.acquire() and first.read() == b"short"
    first.release()


class FreedMetric:
    """Counts how many were freed: each takes its series from the server."""

    made = freed = 0

    def __init__(self, **_: object) -> None:
        type(self).made += 1

    def __del__(self) -> None:
        type(self).freed += 1

    def increment(self, value: float) -> None:
        """Nobody looks at it."""

    set = observe = increment


class FreedFamily(FreedMetric):
    COUNTER = GAUGE = HISTOGRAM = "kind"

    def Metric(self, **_: object) -> FreedMetric:
        return FreedMetric()


def test_no_series_is_ever_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_pb, "MetricFamily", FreedFamily)
    frontend = Frontend(tmp_path, vllm=100)
    frontend.serve_one()
    eventually(lambda: FreedMetric.made > 100)
    frontend.exporter.stop()
    del frontend
    gc.collect()
    assert FreedMetric.freed == FreedFamily.freed == 0
