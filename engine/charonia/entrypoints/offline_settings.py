"""What `LLM` is told: vLLM's engine arguments, and sampling parameters for each prompt."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from charonia.config import EngineConfig
from charonia.errors import InvalidRequestError
from charonia.sampling_params import SamplingParams
from charonia.triton.vllm_arguments import read_vllm_arguments


def offline_config(model: object, settings: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration; what has no effect here is told as a `UserWarning`. Raises `ConfigError`."""
    arguments = read_vllm_arguments(settings)
    for text in arguments.warnings:
        warnings.warn(text, stacklevel=3)
    return EngineConfig.from_mapping(
        {"max_waiting_requests": 1 << 30, **arguments.settings, "model": str(model)}
    )


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
