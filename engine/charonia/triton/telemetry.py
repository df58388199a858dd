"""Metrics, log lines and spans of one model instance, behind one door."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from charonia.errors import CharoniaError, ConfigError
from charonia.triton.engine import EngineClient
from charonia.triton.live_request import LiveRequest
from charonia.triton.metrics_export import MetricsExporter
from charonia.triton.pb import TritonUtils
from charonia.triton.reporter import RequestReporter
from charonia.triton.request_counters import RequestCounters
from charonia.triton.request_log import RequestLog
from charonia.triton.request_record import RequestRecord
from charonia.triton.settings import BackendOptions, InstanceInfo


class Tracer(Protocol):
    """Makes spans of requests that have ended."""

    def __call__(self, record: RequestRecord) -> None:
        """Take one request."""

    def stop(self) -> None:
        """Send what waits."""


def load_tracer(endpoint: str | None, instance: InstanceInfo) -> Tracer | None:
    """A tracer that exports to `endpoint`, or None. Raises `ConfigError` where its packages are missing."""
    if endpoint is None:
        return None
    try:
        tracing = importlib.import_module("charonia.triton.tracing")
    except ImportError as error:
        raise ConfigError(
            f"engine setting 'otlp_traces_endpoint' needs OpenTelemetry: pip install 'charonia[tracing]' ({error})"
        ) from None
    tracer: Tracer = tracing.RequestTracer.over_http(
        endpoint,
        model=instance.model_name,
        version=instance.model_version,
        instance=instance.instance_name,
    )
    return tracer


class Telemetry:
    """Takes note of requests as they end; whatever that costs is paid on other threads. Thread-safe.

    lock_path: held by the one instance that exports the engine's metrics. with_vllm_metrics: whether vLLM's metrics
    may be exported, if the options ask for them.
    """

    def __init__(
        self, utils: TritonUtils, engine: EngineClient, instance: InstanceInfo, options: BackendOptions, *,
        lock_path: Path, with_vllm_metrics: bool = True, tracer: Tracer | None = None,
    ) -> None:  # fmt: skip
        wants_vllm = options.report_custom_metrics and with_vllm_metrics
        self._counters = RequestCounters()
        self._metrics = MetricsExporter(
            utils,
            engine,
            self._counters,
            labels={"model": instance.model_name, "version": instance.model_version},
            engine_labels={"gpu": str(instance.device_id)} if instance.kind == "GPU" else {},
            lock_path=lock_path,
            vllm_max_model_len=engine.max_model_len if wants_vllm else None,
        )
        self._tracer = tracer
        sinks: list[Callable[[RequestRecord], None]] = []
        if options.log_requests != "off":
            full = options.log_requests == "full"
            sinks.append(RequestLog(utils.log_info, instance.model_name, with_texts=full))
        if tracer is not None:
            sinks.append(tracer)
        self._reporter = RequestReporter(sinks, utils.log_warning)

    @property
    def traces(self) -> bool:
        """Whether requests' trace contexts are of any use."""
        return self._tracer is not None

    def note_closed(self, request: LiveRequest, error: CharoniaError | None) -> None:
        """A request has had its last response, or cannot have one."""
        record = RequestRecord.of(request, error, time.monotonic())
        self._counters.note(record)
        self._metrics.nudge()
        self._reporter.note(record)

    def stop(self) -> None:
        """Push, write and send what waits."""
        self._reporter.stop()
        if self._tracer is not None:
            self._tracer.stop()
        self._metrics.stop()
