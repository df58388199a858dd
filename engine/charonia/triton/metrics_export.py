"""Triton custom metrics. Hot paths only note numbers; one thread pushes them, in batches.

Every push of one series is a shared-memory round trip of 20 to 30 microseconds. So counters are pushed as sums, only
series that have changed are pushed, and what happens per token or per step is counted by bucket and pushed as sums too.
Counters and histograms of this frontend add up over a model's instances; what describes the whole engine is exported by
one instance only, the one that holds a lock file in the runtime folder.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from charonia.core.histogram import Histogram
from charonia.core.stats import EngineStats
from charonia.serving.metrics import TokenCounts
from charonia.triton.engine import EngineClient
from charonia.triton.exclusive_file import ExclusiveFile
from charonia.triton.metric_families import (
    ENGINE_FAMILIES,
    FRONTEND_FAMILIES,
    ORCA_FAMILY,
    vllm_families,
)
from charonia.triton.metric_registry import MetricRegistry
from charonia.triton.pb import TritonUtils
from charonia.triton.request_counters import RequestCounters, RequestCounts

PUSH_PERIOD_S = 1.0
MIN_PUSH_PERIOD_S = 0.1
"""A request that ends is pushed at once, but pushes are at least this far apart."""

MAX_INTER_TOKEN_OBSERVATIONS_PER_S = 2000
"""Most observations of vLLM's inter-token histogram, which take about 50 ms of each second then. Past it, as many
stand for all: quantiles stay right, while `_count` and `_sum` fall behind those of our own family."""


class FrontendMetrics(Protocol):
    """A set of metric families that is fed with what this frontend has counted."""

    def push(self, tokens: TokenCounts, requests: RequestCounts) -> None:
        """Push what has been counted since the last call."""


class CharoniaMetrics:
    """Our own families."""

    def __init__(self, registry: MetricRegistry) -> None:
        registry.declare(FRONTEND_FAMILIES)
        self._registry = registry

    def push(self, tokens: TokenCounts, requests: RequestCounts) -> None:
        """See `FrontendMetrics`."""
        registry = self._registry
        for outcome, number in requests.outcomes.items():
            registry.add("charonia_requests_total", number, outcome)
        for code, number in requests.refused.items():
            registry.add("charonia_requests_refused_total", number, code)
        registry.add("charonia_prompt_tokens_total", tokens.prompt_tokens)
        registry.add("charonia_generation_tokens_total", tokens.generation_tokens)
        firsts, done = tokens.first_tokens, requests.completions
        registry.observe("charonia_time_to_first_token_seconds", [first.total for first in firsts])
        registry.observe("charonia_queue_seconds", [first.queue for first in firsts])
        registry.observe("charonia_prefill_seconds", [first.prefill for first in firsts])
        generated = [request for request in done if request.num_generation_tokens]
        registry.observe("charonia_decode_seconds", [request.decode for request in generated])
        registry.observe("charonia_request_seconds", [request.total for request in done])
        registry.add_buckets("charonia_inter_token_latency_seconds", tokens.inter_token)


class VllmMetrics:
    """The families of Triton's vLLM backend, for tools that know those."""

    def __init__(self, registry: MetricRegistry, max_model_len: int) -> None:
        registry.declare(vllm_families(max_model_len))
        self._registry = registry
        self._allowance = float(MAX_INTER_TOKEN_OBSERVATIONS_PER_S)
        self._allowed_at = time.monotonic()

    def push(self, tokens: TokenCounts, requests: RequestCounts) -> None:
        """See `FrontendMetrics`."""
        registry, done = self._registry, requests.completions
        registry.add("vllm:prompt_tokens_total", tokens.prompt_tokens)
        registry.add("vllm:generation_tokens_total", tokens.generation_tokens)
        registry.observe("vllm:time_to_first_token_seconds", [first.total for first in tokens.first_tokens])
        registry.observe("vllm:time_per_output_token_seconds", self._sample(tokens.inter_token))
        registry.observe("vllm:e2e_request_latency_seconds", [request.total for request in done])
        registry.observe("vllm:request_prompt_tokens", [request.num_prompt_tokens for request in done])
        registry.observe(
            "vllm:request_generation_tokens", [request.num_generation_tokens for request in done]
        )
        registry.observe("vllm:request_params_n", [request.num_sequences for request in done])

    def _sample(self, gaps: Histogram) -> list[float]:
        """One value a gap, or as many as are allowed now."""
        now, most = time.monotonic(), MAX_INTER_TOKEN_OBSERVATIONS_PER_S
        self._allowance = min(most, self._allowance + most * (now - self._allowed_at))
        self._allowed_at = now
        sample = gaps.sample(int(self._allowance))
        self._allowance = max(0.0, self._allowance - len(sample))
        return sample


class EngineMetrics:
    """What describes the engine.

    lock: held by whoever pushes. It carries the numbers pushed last, for the instance that takes over: the server's
    series outlive the instance that fed them.
    """

    def __init__(self, registry: MetricRegistry, lock: ExclusiveFile) -> None:
        registry.declare(ENGINE_FAMILIES)
        self._registry = registry
        self._lock = lock
        self._gauges: dict[tuple[str, str], float] = {}

    def push(self, stats: EngineStats, *, ready: bool) -> None:
        """Push the engine's numbers, as far as they have changed. Only for the holder of the lock."""
        before = self._pushed_last(stats)
        self._lock.write(msgspec.json.encode(stats))
        self._set("charonia_engine_ready", float(ready))
        used, total = stats.kv_blocks_used, stats.kv_blocks_total
        self._set("charonia_requests_running", stats.num_running)
        self._set("charonia_requests_waiting", stats.num_waiting)
        self._set("charonia_kv_cache_blocks_used", used)
        self._set("charonia_kv_cache_blocks_total", total)
        self._set("charonia_kv_cache_usage_ratio", used / max(total, 1))
        self._set(ORCA_FAMILY, used, "used")
        self._set(ORCA_FAMILY, total, "max")
        self._set(ORCA_FAMILY, stats.block_size, "tokens_per")
        add, fill = self._registry.add, self._registry.add_buckets
        add("charonia_prefix_cache_queries_total", stats.prefix_cache_queries - before.prefix_cache_queries)
        add("charonia_prefix_cache_hits_total", stats.prefix_cache_hits - before.prefix_cache_hits)
        add("charonia_preemptions_total", stats.preemptions - before.preemptions)
        fill("charonia_step_seconds", stats.step_seconds.since(before.step_seconds))
        fill("charonia_step_tokens", stats.step_tokens.since(before.step_tokens))
        fill("charonia_step_sequences", stats.step_sequences.since(before.step_sequences))

    def _pushed_last(self, stats: EngineStats) -> EngineStats:
        """The numbers of this engine that the server has already; zeros if it has none."""
        try:
            before = msgspec.json.decode(self._lock.read(), type=EngineStats)
        except msgspec.DecodeError:
            return EngineStats()
        # An engine that has been restarted counts from zero again.
        return before if before.started == stats.started else EngineStats()

    def _set(self, name: str, value: float, label: str = "") -> None:
        if self._gauges.get((name, label)) != value:
            self._gauges[name, label] = value
            self._registry.set(name, value, label)


class MetricsExporter:
    """The thread that pushes; without effect on a server that has its metrics turned off.

    labels: of every series. engine_labels: more labels of the engine's series, which tell it from other engines of the
    same model. lock_path: held by the instance that exports the engine's numbers. vllm_max_model_len: the model's
    context length if vLLM's families are wanted too, else None.
    """

    def __init__(
        self, utils: TritonUtils, engine: EngineClient, counters: RequestCounters, *,
        labels: Mapping[str, str], lock_path: Path, engine_labels: Mapping[str, str] | None = None,
        vllm_max_model_len: int | None = None,
    ) -> None:  # fmt: skip
        self._utils = utils
        self._engine = engine
        self._counters = counters
        self._registry = MetricRegistry(utils, labels)
        self._engine_registry = MetricRegistry(utils, {**labels, **(engine_labels or {})})
        self._vllm_max_model_len = vllm_max_model_len
        self._lock = ExclusiveFile(lock_path)
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="charonia-metrics", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """A request has ended: push soon."""
        self._wake.set()

    def stop(self) -> None:
        """Push one last time and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._lock.release()

    def _run(self) -> None:
        try:
            frontend, engine = self._declare()
        except Exception as error:
            self._utils.log_info(f"no custom metrics are exported: {error}")
            return
        last_push = 0.0
        while True:
            self._wake.wait(PUSH_PERIOD_S)
            if not self._stopping:
                time.sleep(max(0.0, last_push + MIN_PUSH_PERIOD_S - time.monotonic()))
            stopping = self._stopping
            self._wake.clear()
            last_push = time.monotonic()
            try:
                self._push(frontend, engine)
            except Exception as error:
                self._utils.log_warning(f"metrics could not be pushed: {error!r}")
            if stopping:
                return

    def _declare(self) -> tuple[list[FrontendMetrics], EngineMetrics]:
        frontend: list[FrontendMetrics] = [CharoniaMetrics(self._registry)]
        if self._vllm_max_model_len is not None:
            frontend.append(VllmMetrics(self._registry, self._vllm_max_model_len))
        return frontend, EngineMetrics(self._engine_registry, self._lock)

    def _push(self, frontend: list[FrontendMetrics], engine: EngineMetrics) -> None:
        tokens, requests = self._engine.meter.take(), self._counters.take()
        for metrics in frontend:
            metrics.push(tokens, requests)
        if self._lock.acquire():
            engine.push(self._engine.stats(), ready=self._engine.is_ready)
