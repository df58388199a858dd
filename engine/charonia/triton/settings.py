"""What `config.pbtxt` and `1/model.json` say."""

import json
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charonia.config import EngineConfig
from charonia.errors import ConfigError

DEFAULT_MODEL = "default"
"""The value of `model` that stands for the embedded default model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceInfo:
    """What Triton says about the model instance that this process is.

    kind: GPU, CPU or MODEL. device_id: meaningful for GPU.
    """

    model_name: str
    model_version: str
    instance_name: str
    kind: str
    device_id: int
    version_dir: Path
    parameters: Mapping[str, str]

    @classmethod
    def from_args(cls, args: Mapping[str, str]) -> "InstanceInfo":
        """From the argument of `TritonPythonModel.initialize`. Raises `ConfigError` unless the model is decoupled."""
        model_config = json.loads(args["model_config"])
        if not model_config.get("model_transaction_policy", {}).get("decoupled", False):
            raise ConfigError("config.pbtxt must hold 'model_transaction_policy { decoupled: true }'")
        entries = model_config.get("parameters", {}).items()
        return cls(
            model_name=args["model_name"],
            model_version=args["model_version"],
            instance_name=args["model_instance_name"],
            kind=args["model_instance_kind"],
            device_id=int(args["model_instance_device_id"]),
            version_dir=(Path(args["model_repository"]) / args["model_version"]).absolute(),
            parameters={name: value.get("string_value", "") for name, value in entries},
        )

    @property
    def engine_identity(self) -> str:
        """What tells this model's engine from other engines of the same server."""
        device = f"/gpu{self.device_id}" if self.kind == "GPU" else ""
        return f"{self.model_name}/{self.model_version}{device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """The adapter's own settings: `parameters` of `config.pbtxt`, as strings there.

    response_senders: threads that send responses. cancel_final_delay_ms: see `Responder`; 0 turns it off, for servers
    newer than 24.10. drain_timeout_s: how long requests may go on once the server is exiting; by default what its
    --exit-timeout-secs allows. runtime_dir: private folder for sockets, instead of one under /tmp.
    ignored_request_parameters: names, separated by commas, of request parameters that are for others (forwarded
    headers, say). Parameters with other names belong to Triton and are left alone.
    """

    response_senders: int = 2
    cancel_final_delay_ms: int = 250
    drain_timeout_s: float | None = None
    runtime_dir: Path | None = None
    ignored_request_parameters: frozenset[str] = frozenset()

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> "BackendOptions":
        """Read the settings that are given. Raises `ConfigError` that names the parameter."""
        values: dict[str, Any] = {}
        for name, read in _READERS.items():
            text = parameters.get(name, "").strip()
            if text:
                try:
                    values[name] = read(text)
                except ValueError as error:
                    raise ConfigError(f"model parameter {name!r}: {error}, got {text!r}") from None
        return cls(**values)


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 86400.0:
        raise ValueError("must be a number of seconds from 0 to 86400")
    return value


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


_READERS: dict[str, Callable[[str], Any]] = {
    "response_senders": _integer(1, 64),
    "cancel_final_delay_ms": _integer(0, 60_000),
    "drain_timeout_s": _seconds,
    "runtime_dir": Path,
    "ignored_request_parameters": _names,
}


def read_engine_config(instance: InstanceInfo, default_model: Callable[[], Path]) -> EngineConfig:
    """The engine's configuration from `model.json`, made to fit the kind of this instance.

    Relative paths count from the version directory. default_model: prepares the embedded model and returns its
    directory. Raises `ConfigError` that names the setting.
    """
    path = instance.version_dir / "model.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f'{path} is missing: it names the model, as in {{"model": "/path/to/checkpoint"}}'
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object of engine settings")
    if instance.kind == "GPU" and _world_size(values) > 1:
        raise ConfigError(
            "KIND_GPU is for models on a single GPU; with 'tensor_parallel_size' above 1 please specify KIND_MODEL "
            "in the instance_group of config.pbtxt"
        )
    if values.get("model") == DEFAULT_MODEL:
        values["model"] = str(default_model())
    for key in ("model", "tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = str(instance.version_dir / values[key])
    _fit_device(values, instance.kind)
    return EngineConfig.from_mapping(values)


def _world_size(values: Mapping[str, Any]) -> int:
    size = values.get("tensor_parallel_size", 1)
    return size if isinstance(size, int) else 1


def _fit_device(values: dict[str, Any], kind: str) -> None:
    wanted = {"CPU": "cpu", "GPU": "cuda"}.get(kind)
    if wanted is None:
        return
    device = values.get("device", "auto")
    if device not in ("auto", wanted):
        raise ConfigError(f"engine setting 'device' is {device!r}, but the instance_group says KIND_{kind}")
    values["device"] = wanted


def pin_device(instance: InstanceInfo, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the engine process, which inherits the environment, see only the GPU that Triton gave this instance."""
    if instance.kind != "GPU":
        return
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if visible and instance.device_id >= len(visible):
        raise ConfigError(
            f"instance {instance.instance_name!r} is to run on GPU {instance.device_id}, but CUDA_VISIBLE_DEVICES "
            f"lists {len(visible)}"
        )
    environment["CUDA_VISIBLE_DEVICES"] = (
        visible[instance.device_id].strip() if visible else str(instance.device_id)
    )
