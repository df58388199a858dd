"""The one door to `triton_python_backend_utils`, a module that exists nowhere but inside a Python-backend stub."""

import ctypes
import importlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from charonia.errors import ConfigError, ErrorCode

AnyArray = npt.NDArray[Any]
T = TypeVar("T")


class PbTensor(Protocol):
    """An input tensor; `as_numpy` yields a copy (dtype object, of bytes, for strings)."""

    def name(self) -> str:
        """The input's name."""

    def as_numpy(self) -> AnyArray:
        """Its values."""


class PbResponseSender(Protocol):
    """Where one request's responses go.

    `is_cancelled` after a `send` with FINAL kills the server: callers serialise the two.
    """

    def send(self, response: object = None, flags: int = 0) -> None:
        """Hand a response (or flags alone) to the server; blocks for a shared-memory round trip."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone; blocks for a shared-memory round trip."""


class PbTrace(Protocol):
    """The server's trace of one request."""

    def get_context(self) -> str | None:
        """Its W3C trace context as a JSON object; None where the server does not trace with OpenTelemetry."""


class PbRequest(Protocol):
    """An inference request as the stub hands it over."""

    def inputs(self) -> Sequence[PbTensor]:
        """The input tensors that the client sent."""

    def parameters(self) -> str:
        """The request parameters: a JSON object of scalars."""

    def request_id(self) -> str:
        """The client's id of the request, maybe empty."""

    def timeout(self) -> int:
        """The request's timeout in microseconds, 0 for none."""

    def trace(self) -> PbTrace:
        """The server's trace of the request."""

    def get_response_sender(self) -> PbResponseSender:
        """The request's response sender."""


class PbMetric(Protocol):
    """One labelled series of a metric family. Every call is a shared-memory round trip."""

    def increment(self, value: float) -> None:
        """Add to a counter or gauge."""

    def set(self, value: float) -> None:
        """Set a gauge."""

    def observe(self, value: float) -> None:
        """Add an observation to a histogram."""


def keep_forever(metric: T) -> T:
    """The same family or series, which this process will never free.

    Freed while the stub runs, it takes the series from the server, even where a newer instance of the model pushes to
    it; freed when the interpreter ends, the stub dies of a segmentation fault. Both were seen with release 24.10.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(metric))
    return metric


class TritonUtils:
    """Typed face of the stub's utility module."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.final_flag = int(module.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    @classmethod
    def load(cls) -> "TritonUtils":
        """The module of the stub that this code runs in."""
        module = importlib.import_module("triton_python_backend_utils")
        quicken_strings(module)
        return cls(module)

    def check_numpy(self) -> None:
        """Raise `ConfigError` unless this stub can read tensors with the numpy at hand.

        A stub whose pybind11 predates numpy 2 reads every element as the first one under numpy 2, silently. The
        numpy version alone does not tell (newer stubs take numpy 2), so a tensor makes the way through the stub.
        The detour over the stub's own DLPack capsule is what makes it build the array anew.
        """
        expected = np.arange(1, 5, dtype=np.uint8)
        capsule = self._module.Tensor("probe", expected).to_dlpack()
        seen = self._module.Tensor.from_dlpack("probe", capsule).as_numpy()
        if not np.array_equal(seen, expected):
            raise ConfigError(
                f"this Triton Python stub cannot read tensors with numpy {np.__version__}: "
                f"it was built for numpy 1; install 'numpy<2' in the Python environment of the server"
            )

    def response(self, outputs: Mapping[str, AnyArray]) -> object:
        """A response with these output tensors."""
        tensors = [self._module.Tensor(name, array) for name, array in outputs.items()]
        return self._module.InferenceResponse(output_tensors=tensors)

    def error_response(self, code: ErrorCode, message: str) -> object:
        """A response that carries an error. Servers that do not know a code report it as INTERNAL."""
        error_type = self._module.TritonError
        return self._module.InferenceResponse(
            output_tensors=[], error=error_type(message, getattr(error_type, code.value, error_type.INTERNAL))
        )

    def metric_family(self, kind: str, name: str, description: str) -> Any:
        """A metric family; kind: counter, gauge or histogram. Raises when the server has metrics turned off."""
        family = self._module.MetricFamily
        return family(name=name, description=description, kind=getattr(family, kind.upper()))

    def log_info(self, message: str) -> None:
        """Write to the server's log."""
        self._module.Logger.log_info(message)

    def log_warning(self, message: str) -> None:
        """Write to the server's log."""
        self._module.Logger.log_warn(message)

    def log_error(self, message: str) -> None:
        """Write to the server's log."""
        self._module.Logger.log_error(message)


_LENGTH = struct.Struct("<I")


def quicken_strings(module: Any) -> None:
    """Have the stub's module serialise a tensor of one string, which is all that most responses have, without numpy's
    iterators: they take a process that has slept longer than the rest of the response.

    The stub looks `serialize_byte_tensor` up in the module for each tensor. A module that does not do what releases up
    to now do is left as it is.
    """
    original = getattr(module, "serialize_byte_tensor", None)
    if original is None:
        return
    quick = _quick_serializer(original)
    probe = np.array([b"a string"], dtype=np.object_)
    expected = original(probe)
    if type(expected) is bytes and expected == quick(probe):
        module.serialize_byte_tensor = quick


def _quick_serializer(original: Callable[[AnyArray], Any]) -> Callable[[AnyArray], Any]:
    def serialize(array: AnyArray) -> Any:
        if array.size == 1:
            value = array.item()
            if type(value) is bytes:
                return _LENGTH.pack(len(value)) + value
        return original(array)

    return serialize
