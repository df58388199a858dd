"""What an instance reports, by its settings: metrics, log lines, spans."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from charonia.errors import ConfigError, InvalidRequestError
from charonia.triton import telemetry as telemetry_module
from charonia.triton.live_request import LiveRequest
from charonia.triton.pb import TritonUtils
from charonia.triton.request_record import RequestRecord
from charonia.triton.settings import BackendOptions, InstanceInfo
from charonia.triton.telemetry import Telemetry, load_tracer
from support import fake_pb
from support.fake_engine import FakeEngine
from support.fake_pb import Logger, MetricFamily, Sender

INSTANCE = InstanceInfo(
    model_name="llm", model_version="1", instance_name="llm_0_0", kind="MODEL", device_id=0,
    version_dir=Path("/nowhere"), parameters={},
)  # fmt: skip


@dataclass
class Tracer:
    """Keeps what it is told."""

    records: list[RequestRecord]
    stopped: bool = False

    def __call__(self, record: RequestRecord) -> None:
        self.records.append(record)

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture(autouse=True)
def clean() -> None:
    MetricFamily.known.clear()
    Logger.lines.clear()


def report(
    folder: Path, *, instance: InstanceInfo = INSTANCE, with_vllm_metrics: bool = True,
    tracer: Tracer | None = None, **options: object,
) -> Telemetry:  # fmt: skip
    """Let a request fail under these settings."""
    engine = FakeEngine()
    telemetry = Telemetry(
        TritonUtils(fake_pb), engine, instance, BackendOptions(**options),
        lock_path=folder / "lock", with_vllm_metrics=with_vllm_metrics, tracer=tracer,
    )  # fmt: skip
    request = LiveRequest(Sender(), lambda _: None)
    request.request_id = "r-1"
    telemetry.note_closed(request, InvalidRequestError("a secret is bad"))
    telemetry.stop()
    engine.shutdown(0.0)
    return telemetry


@pytest.mark.parametrize(("asked", "allowed"), [(True, True), (True, False), (False, True)])
def test_vllms_metrics(tmp_path: Path, asked: bool, allowed: bool) -> None:
    report(tmp_path, report_custom_metrics=asked, with_vllm_metrics=allowed)
    assert any(name.startswith("vllm:") for name in MetricFamily.known) == (asked and allowed)
    (refused,) = (m for m in MetricFamily.known["charonia_requests_refused_total"].metrics if m.value)
    assert refused.labels == {"model": "llm", "version": "1", "code": "INVALID_ARG"}


def test_each_gpu_has_an_engine_of_its_own(tmp_path: Path) -> None:
    for device_id in (0, 1):
        instance = dataclasses.replace(INSTANCE, kind="GPU", device_id=device_id)
        report(tmp_path, instance=instance)
        labels = MetricFamily.known["charonia_kv_cache_usage_ratio"].metrics[-1].labels
        assert labels == {"model": "llm", "version": "1", "gpu": str(device_id)}
    assert "gpu" not in MetricFamily.known["charonia_prompt_tokens_total"].metrics[-1].labels


@pytest.mark.parametrize(
    ("log_requests", "words"), [("off", []), ("summary", ["id=r-1"]), ("full", ["secret"])]
)
def test_log_lines(tmp_path: Path, log_requests: str, words: list[str]) -> None:
    report(tmp_path, log_requests=log_requests)
    assert len(Logger.lines) == len(words)
    assert all(word in line for word, line in zip(words, Logger.lines, strict=True))


def test_spans(tmp_path: Path) -> None:
    tracer = Tracer([])
    assert report(tmp_path, tracer=tracer).traces
    assert tracer.stopped and [record.request_id for record in tracer.records] == ["r-1"]
    assert not report(tmp_path).traces


def test_nothing_of_opentelemetry_is_loaded_unless_asked_for() -> None:
    code = (
        "import sys, charonia.triton.backend; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tracer_is_loaded_where_spans_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_tracer(None, INSTANCE) is None
    tracer = load_tracer("http://127.0.0.1:9", INSTANCE)
    assert tracer is not None
    tracer.stop()
    with pytest.raises(ConfigError, match="http or https"):
        load_tracer("127.0.0.1:4317", INSTANCE)

    def missing(name: str) -> None:
        raise ImportError("No module named 'opentelemetry'")

    monkeypatch.setattr(telemetry_module.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'charonia\[tracing\]'"):
        load_tracer("http://127.0.0.1:9", INSTANCE)
