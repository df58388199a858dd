"""The parts of `triton_python_backend_utils` that the adapter uses, in plain Python."""

import threading
import time
from typing import Any, ClassVar

import numpy as np


class _Capsule:
    def __init__(self, array: Any) -> None:
        self.array = array


class Tensor:
    broken = False
    """As under a stub that cannot read the numpy at hand."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array

    def to_dlpack(self) -> _Capsule:
        return _Capsule(self._array)

    @classmethod
    def from_dlpack(cls, name: str, capsule: _Capsule) -> "Tensor":
        array = capsule.array
        return cls(name, np.full_like(array, array[0]) if cls.broken else array)


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, CANCELLED = (
        "UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "CANCELLED",
    )  # fmt: skip

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error

    @property
    def texts(self) -> list[str]:
        return [value.decode() for value in self.outputs["text_output"]]


class Metric:
    def __init__(self, labels: dict[str, str], buckets: list[float] | None = None) -> None:
        self.labels, self.buckets = labels, buckets
        self.value = 0.0
        self.observations: list[float] = []

    def increment(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.observations.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    known: ClassVar[dict[str, "MetricFamily"]] = {}
    disabled = False

    def __init__(self, name: str, description: str, kind: str) -> None:
        if self.disabled:
            raise RuntimeError("metrics not supported")
        self.name, self.description, self.kind = name, description, kind
        self.metrics: list[Metric] = []
        self.known[name] = self

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
        metric = Metric(labels, buckets)
        self.metrics.append(metric)
        return metric


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.lines.append(message)

    log_warn = log_error = log_info


TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Sender:
    """A response sender that notes what it is given and dies as the real one does."""

    def __init__(self, *, send_s: float = 0.0, fails: bool = False) -> None:
        self.responses: list[InferenceResponse] = []
        self.final_times: list[float] = []
        self.cancelled = False
        self.polls = 0
        self.violations: list[str] = []
        self.finished = threading.Event()
        self._send_s, self._fails = send_s, fails

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.finished.is_set():
            self.violations.append("send after FINAL")
        if self._send_s:
            time.sleep(self._send_s)
        if response is not None:
            self.responses.append(response)
        if flags:
            self.final_times.append(time.monotonic())
            self.finished.set()
        if self._fails:
            raise RuntimeError("the client is gone")

    def is_cancelled(self) -> bool:
        self.polls += 1
        if self.finished.is_set():
            self.violations.append("is_cancelled after FINAL")
        time.sleep(0.0001)
        return self.cancelled


class InferenceTrace:
    def __init__(self, context: str | None) -> None:
        self._context = context

    def get_context(self) -> str | None:
        return self._context


class Request:
    def __init__(
        self, inputs: dict[str, Any] | None = None, parameters: str = "{}", request_id: str = "", timeout: int = 0,
        sender: Sender | None = None, trace_context: str | None = None,
    ) -> None:  # fmt: skip
        self._trace = InferenceTrace(trace_context)
        self._inputs = [Tensor(name, array) for name, array in (inputs or {}).items()]
        self._parameters, self._request_id, self._timeout = parameters, request_id, timeout
        self.sender = sender or Sender()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters

    def request_id(self) -> str:
        return self._request_id

    def timeout(self) -> int:
        return self._timeout

    def trace(self) -> InferenceTrace:
        return self._trace

    def get_response_sender(self) -> Sender:
        return self.sender


def text(*values: str | bytes) -> Any:
    array = np.empty(len(values), dtype=object)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return array


def flag(value: bool) -> Any:
    return np.array([value])
