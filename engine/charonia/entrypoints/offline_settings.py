"""What `LLM` is told: vLLM's engine arguments, and the sampling that a checkpoint recommends."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from charonia.config import EngineConfig
from charonia.errors import InvalidRequestError, ModelLoadError
from charonia.hf_config import read_json_object
from charonia.sampling_params import SamplingParams
from charonia.triton.vllm_arguments import read_vllm_arguments

_RECOMMENDED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Keys of generation_config.json that vLLM samples by, and their names among the sampling parameters."""


def offline_config(model: object, settings: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration; what has no effect here is told as a `UserWarning`. Raises `ConfigError`."""
    arguments = read_vllm_arguments(settings)
    for text in arguments.warnings:
        warnings.warn(text, stacklevel=3)
    return EngineConfig.from_mapping(
        {"max_waiting_requests": 1 << 30, **arguments.settings, "model": str(model)}
    )


def recommended_sampling(model_dir: str) -> SamplingParams:
    """The checkpoint's own sampling parameters, from generation_config.json; `SamplingParams()` where it has none.

    Raises `ModelLoadError` if they are no sampling parameters.
    """
    path = Path(model_dir) / "generation_config.json"
    values = read_json_object(path) if path.is_file() else {}
    stated = {name: values[key] for key, name in _RECOMMENDED.items() if values.get(key) is not None}
    try:
        return SamplingParams.from_mapping(stated)
    except InvalidRequestError as error:
        raise ModelLoadError(f"generation_config.json: {error}") from None


def each_sampling(
    params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> Sequence[SamplingParams]:
    """One for each prompt. Raises `InvalidRequestError` for anything else than sampling parameters."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    items: Sequence[object] = params if isinstance(params, Sequence) else [params]
    for item in items:
        if not isinstance(item, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams, or a list of one for each prompt, got {type(item).__name__}"
            )
    return params
