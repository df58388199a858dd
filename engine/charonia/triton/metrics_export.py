"""Triton custom metrics, all from here. Hot paths only note numbers; one thread pushes them, once a second.

Every push of one series is a shared-memory round trip of about 20 microseconds, so counters are pushed as sums and
nothing is observed per token. Counters and histograms of this frontend add up over a model's instances; what describes
the whole engine is exported by one instance only, the one that holds a lock file in the runtime folder.
"""

import fcntl
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from charonia.core.stats import EngineStats
from charonia.errors import CharoniaError, ErrorCode
from charonia.triton.live_request import LiveRequest
from charonia.triton.pb import PbMetric, TritonUtils

PUSH_PERIOD_S = 1.0
_MAX_OBSERVATIONS = 4096
"""Most observations of one histogram between two pushes; older ones are dropped past it."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_COUNTERS = {
    "charonia_requests_total": "Requests that ended, by outcome",
    "charonia_requests_refused_total": "Requests refused before they reached the engine's scheduler, by error code",
    "charonia_prompt_tokens_total": "Prompt tokens of requests that ended well",
    "charonia_generation_tokens_total": "Tokens generated for requests that ended well",
}
_HISTOGRAMS = {
    "charonia_time_to_first_token_seconds": "From a request's arrival to its first response (streaming) or token",
    "charonia_inter_token_latency_seconds": "Mean time between the tokens of a request after its first",
    "charonia_queue_seconds": "From a request's arrival to its first step",
    "charonia_request_seconds": "From a request's arrival to its last response",
}
_ENGINE_GAUGES = {
    "charonia_requests_running": "Requests that have a place in the running batch",
    "charonia_requests_waiting": "Requests that wait for a place in the running batch",
    "charonia_kv_cache_blocks_used": "KV-cache blocks that live requests hold",
    "charonia_kv_cache_blocks_total": "KV-cache blocks there are",
    "charonia_kv_cache_usage_ratio": "Share of the KV-cache blocks that live requests hold",
}
_ENGINE_COUNTERS = {
    "charonia_prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache",
    "charonia_prefix_cache_hits_total": "Prompt tokens found in the prefix cache",
    "charonia_preemptions_total": "Times a running request gave up its KV-cache blocks and started over",
    "charonia_steps_total": "Engine steps",
    "charonia_step_seconds_total": "Time from the launch of a step to its result, over all steps",
    "charonia_scheduled_tokens_total": "Tokens computed, prompt and output",
}
_ORCA_FAMILY = "nv_trt_llm_kv_cache_block_metrics"
"""The family from which Triton itself makes the load report in its ORCA response header."""

_LABEL_OF = {
    "charonia_requests_total": "outcome",
    "charonia_requests_refused_total": "code",
    _ORCA_FAMILY: "kv_cache_block_type",
}
"""Families whose series differ by a label of their own."""


class FrontendCounters:
    """What this frontend has seen since the last push. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._observations: dict[str, deque[float]] = _empty_observations()

    def closed(self, request: LiveRequest, error: CharoniaError | None, now: float) -> None:
        """A request has had its last response at `now` (monotonic)."""
        last = request.assembler.last if request.assembler is not None else None
        if error is not None or last is None or request.assembler is None:
            self._closed_with_error(request, error)
            return
        reasons = [item.finish_reason for item in last.outputs if item.finish_reason is not None]
        num_tokens = request.assembler.num_tokens
        streamed = request.options.stream and request.first_sent_at is not None
        first = (request.first_sent_at or now) - request.arrival if streamed else last.timings.first_token
        with self._lock:
            self._counts["charonia_requests_total", reasons[-1].value if reasons else "stop"] += 1
            self._counts["charonia_prompt_tokens_total", ""] += len(last.prompt_token_ids)
            self._counts["charonia_generation_tokens_total", ""] += num_tokens
            self._observations["charonia_queue_seconds"].append(last.timings.queue)
            self._observations["charonia_time_to_first_token_seconds"].append(first)
            self._observations["charonia_request_seconds"].append(now - request.arrival)
            per_sequence = num_tokens / request.assembler.num_sequences
            if per_sequence > 1:
                mean = (last.timings.total - last.timings.first_token) / (per_sequence - 1)
                self._observations["charonia_inter_token_latency_seconds"].append(max(mean, 0.0))

    def _closed_with_error(self, request: LiveRequest, error: CharoniaError | None) -> None:
        code = error.code if error is not None else ErrorCode.INTERNAL
        refused = not request.submitted and code is not ErrorCode.CANCELLED
        with self._lock:
            if refused:
                self._counts["charonia_requests_refused_total", code.value] += 1
            else:
                self._counts["charonia_requests_total", code.value.lower()] += 1

    def take(self) -> tuple[Mapping[tuple[str, str], int], Mapping[str, deque[float]]]:
        """Counts by (name, label value) and observations by name since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            observations, self._observations = self._observations, _empty_observations()
        return counts, observations


def _empty_observations() -> dict[str, deque[float]]:
    return {name: deque(maxlen=_MAX_OBSERVATIONS) for name in _HISTOGRAMS}


@dataclass(frozen=True)
class EngineValues:
    """One engine's numbers by metric name (gauges, counters) and by KV-cache block type (orca)."""

    gauges: Mapping[str, float]
    counters: Mapping[str, float]
    orca: Mapping[str, float]

    @classmethod
    def from_stats(cls, stats: EngineStats) -> "EngineValues":
        """Name the numbers."""
        return cls(
            gauges={
                "charonia_requests_running": stats.num_running,
                "charonia_requests_waiting": stats.num_waiting,
                "charonia_kv_cache_blocks_used": stats.kv_blocks_used,
                "charonia_kv_cache_blocks_total": stats.kv_blocks_total,
                "charonia_kv_cache_usage_ratio": stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
            },
            counters={
                "charonia_prefix_cache_queries_total": stats.prefix_cache_queries,
                "charonia_prefix_cache_hits_total": stats.prefix_cache_hits,
                "charonia_preemptions_total": stats.preemptions,
                "charonia_steps_total": stats.steps,
                "charonia_step_seconds_total": stats.step_seconds,
                "charonia_scheduled_tokens_total": stats.scheduled_tokens,
            },
            orca={"used": stats.kv_blocks_used, "max": stats.kv_blocks_total, "tokens_per": stats.block_size},
        )


class MetricsExporter:
    """The thread that pushes; without effect on a server that has its metrics turned off.

    labels: of every series. lock_path: held by the instance that exports the engine's numbers.
    """

    def __init__(
        self, utils: TritonUtils, counters: FrontendCounters, stats: Callable[[], EngineStats], *,
        labels: Mapping[str, str], lock_path: Path,
    ) -> None:  # fmt: skip
        self._utils = utils
        self._counters = counters
        self._stats = stats
        self._labels = dict(labels)
        self._lock = ExclusiveFile(lock_path)
        self._registry = _Registry(utils, self._labels)
        self._engine_counts: dict[str, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="charonia-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Push one last time and end the thread."""
        self._stopped.set()
        self._thread.join()
        self._lock.release()

    def _run(self) -> None:
        try:
            self._registry.declare()
        except Exception as error:
            self._utils.log_info(f"no custom metrics are exported: {error}")
            return
        while True:
            stopping = self._stopped.wait(PUSH_PERIOD_S)
            try:
                self._push()
            except Exception as error:
                self._utils.log_warning(f"metrics could not be pushed: {error!r}")
            if stopping:
                return

    def _push(self) -> None:
        counts, observations = self._counters.take()
        for (name, label), count in counts.items():
            self._registry.series(name, label).increment(count)
        for name, values in observations.items():
            series = self._registry.series(name)
            for value in values:
                series.observe(value)
        if self._lock.acquire():
            self._push_engine(EngineValues.from_stats(self._stats()))

    def _push_engine(self, values: EngineValues) -> None:
        for name, value in values.gauges.items():
            self._registry.series(name).set(value)
        for kind, value in values.orca.items():
            self._registry.series(_ORCA_FAMILY, kind).set(value)
        for name, value in values.counters.items():
            # An engine that was restarted counts from zero again.
            before = self._engine_counts.get(name, 0.0)
            added = value - before if value >= before else value
            self._engine_counts[name] = value
            if added:
                self._registry.series(name).increment(added)


class _Registry:
    """Metric families, and their series as they come up."""

    def __init__(self, utils: TritonUtils, labels: Mapping[str, str]) -> None:
        self._utils = utils
        self._labels = labels
        self._families: dict[str, Callable[..., PbMetric]] = {}
        self._series: dict[tuple[str, str], PbMetric] = {}

    def declare(self) -> None:
        """Make the families, and the series whose labels are known, so that they show from the start."""
        kinds = [("counter", _COUNTERS | _ENGINE_COUNTERS), ("gauge", _ENGINE_GAUGES), ("histogram", _HISTOGRAMS),
                 ("gauge", {_ORCA_FAMILY: "KV-cache blocks in use, in all, and tokens per block"})]  # fmt: skip
        for kind, families in kinds:
            for name, description in families.items():
                family = self._utils.metric_family(kind, name, description)
                self._families[name] = family.Metric
                if name not in _LABEL_OF:
                    self.series(name)

    def series(self, name: str, label: str = "") -> PbMetric:
        """The series of a family, with the value of its own label if it has one."""
        metric = self._series.get((name, label))
        if metric is None:
            labels = dict(self._labels)
            if name in _LABEL_OF:
                labels[_LABEL_OF[name]] = label
            extra = {"buckets": list(_SECONDS)} if name in _HISTOGRAMS else {}
            metric = self._families[name](labels=labels, **extra)
            self._series[name, label] = metric
        return metric


class ExclusiveFile:
    """A lock file that one process holds at a time; the kernel frees it when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether this process holds the lock, or has just got it; never waits."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between the two calls.
            if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:  # noqa: PTH116
                self._descriptor, descriptor = descriptor, -1
        except OSError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return self._descriptor is not None

    def release(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
