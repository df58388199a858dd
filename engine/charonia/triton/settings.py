"""What `config.pbtxt` and `1/model.json` say."""

import json
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from charonia.config import EngineConfig
from charonia.errors import ConfigError
from charonia.triton.vllm_arguments import read_vllm_arguments

RequestLogging = Literal["off", "summary", "full"]

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
    headers, say). log_requests: a line in the server's log for each request that has ended: "off", "summary", or
    "full", with the beginning of the prompt and the error's message. report_custom_metrics (REPORT_CUSTOM_METRICS):
    also export the metrics of Triton's vLLM backend under their own names. Parameters with other names belong to
    Triton and are left alone.
    """

    response_senders: int = 2
    cancel_final_delay_ms: int = 250
    drain_timeout_s: float | None = None
    runtime_dir: Path | None = None
    ignored_request_parameters: frozenset[str] = frozenset()
    log_requests: RequestLogging = "summary"
    report_custom_metrics: bool = False

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> "BackendOptions":
        """Read the settings that are given. Raises `ConfigError` that names the parameter."""
        values: dict[str, Any] = {}
        for name, read in _READERS.items():
            text = parameters.get(name, "").strip()
            if text:
                try:
                    values[name.lower()] = read(text)
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


def _choice(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "yes", "false", "no"):
        raise ValueError("must be true or false")
    return text.lower() in ("true", "yes")


_READERS: dict[str, Callable[[str], Any]] = {
    "response_senders": _integer(1, 64),
    "cancel_final_delay_ms": _integer(0, 60_000),
    "drain_timeout_s": _seconds,
    "runtime_dir": Path,
    "ignored_request_parameters": _names,
    "log_requests": _choice("off", "summary", "full"),
    "REPORT_CUSTOM_METRICS": _boolean,
}


def read_engine_config(
    instance: InstanceInfo, default_model: Callable[[], Path], warn: Callable[[str], None] = lambda text: None
) -> EngineConfig:
    """The engine's configuration from `model.json`, made to fit the kind of this instance.

    Relative paths count from the version directory. default_model: prepares the embedded model and returns its
    directory. warn: is told of vLLM's settings that make no difference here. Raises `ConfigError` that names the
    setting.
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
            "KIND_GPU is for models on a single GPU; with 'tensor_parallel_size' or 'pipeline_parallel_size' above 1 "
            "please specify KIND_MODEL in the instance_group of config.pbtxt"
        )
    arguments = read_vllm_arguments(values)
    settings = arguments.settings
    if settings.get("model") == DEFAULT_MODEL:
        settings["model"] = str(default_model())
    for key in ("model", "tokenizer"):
        if isinstance(settings.get(key), str):
            settings[key] = _openable(key, str(instance.version_dir / settings[key]))
    _fit_device(settings, instance.kind)
    config = EngineConfig.from_mapping(settings)
    for text in arguments.warnings:
        warn(text)
    return config


def _openable(key: str, path: str) -> str:
    """The path itself. The Python within a stub may be one whose file names are ASCII, whatever the locale says."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ConfigError(
            f"engine setting {key!r}: the Python of this Triton stub cannot open {path!a}; name a link to it whose "
            "own path is ASCII"
        ) from None
    return path


def _world_size(values: Mapping[str, Any]) -> int:
    """Devices that the model is to run on; a size that is no number is refused later, by its name."""
    size = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        given = str(values.get(key, 1))
        size *= int(given) if given.isdecimal() else 1
    return size


def _fit_device(values: dict[str, Any], kind: str) -> None:
    wanted = {"CPU": "cpu", "GPU": "cuda"}.get(kind)
    if wanted is None:
        return
    device = values.get("device", "auto")
    if device not in ("auto", wanted):
        raise ConfigError(f"engine setting 'device' is {device!r}, but the instance_group says KIND_{kind}")
    values["device"] = wanted


def pin_device(instance: InstanceInfo, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the engine process, which inherits the environment, see only the GPUs that are this instance's.

    Those are the one that Triton gave it (KIND_GPU), or those that the model parameter `GPU_DEVICE_IDS` lists
    (KIND_MODEL); both count among the GPUs that the server itself sees. Raises `ConfigError`.
    """
    if instance.kind == "GPU":
        device_ids = [instance.device_id]
    elif instance.kind == "MODEL":
        device_ids = _gpu_device_ids(instance.parameters.get("GPU_DEVICE_IDS", ""))
    else:
        return
    visible = [
        name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()
    ]
    for device_id in device_ids:
        if visible and device_id >= len(visible):
            raise ConfigError(
                f"instance {instance.instance_name!r} is to run on GPU {device_id}, but CUDA_VISIBLE_DEVICES "
                f"lists {len(visible)}"
            )
    if device_ids:
        names = [visible[device_id] if visible else str(device_id) for device_id in device_ids]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)


def _gpu_device_ids(text: str) -> list[int]:
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    if not all(name.isascii() and name.isdecimal() for name in names) or len(set(map(int, names))) < len(
        names
    ):
        raise ConfigError(
            f"model parameter 'GPU_DEVICE_IDS' must list different GPU numbers, separated by commas, got {text[:80]!r}"
        )
    return [int(name) for name in names]
