"""How a checkpoint wants to be sampled: generation_config.json in terms of sampling parameters."""

import contextlib
from collections.abc import Mapping
from typing import Any

from charonia.errors import InvalidRequestError
from charonia.sampling_params import SamplingParams

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""The keys that vLLM reads, and what the parameters are called."""


def recommended_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Values by parameter, of the contents of generation_config.json.

    One that no request could ask for is left out: a model is not refused for what most requests say themselves.
    """
    recommended: dict[str, Any] = {}
    for key, name in _NAMES.items():
        if generation.get(key) is not None:
            with contextlib.suppress(InvalidRequestError):
                params = SamplingParams.from_mapping({name: generation[key]})
                recommended[name] = getattr(params, name)
    return recommended
