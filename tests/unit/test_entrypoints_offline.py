"""What `LLM` makes of vLLM's arguments, and of wrong values."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from charonia.config import EngineConfig
from charonia.entrypoints.offline_settings import each_sampling, offline_config
from charonia.errors import ConfigError, InvalidRequestError
from charonia.sampling_params import SamplingParams


def test_arguments_of_vllm_are_taken_as_in_a_repository() -> None:
    with pytest.warns(UserWarning, match="'swap_space' is ignored"):
        config = offline_config("/m", {"swap_space": 4, "seed": None, "dtype": "half", "task": "generate"})
    assert (config.model, config.dtype, config.seed) == ("/m", "float16", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offline_config(Path("/m"), {"max_model_len": 128, "trust_remote_code": False})
    for settings in ({"nonsense": 1}, {"pipeline_parallel_size": 2}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            offline_config("/m", settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16"}, "'dtype' must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'bf16'"),
        ({"quantization": "awq"}, "'quantization' must be null, got 'awq': .* no quantised weights"),
        ({"max_num_seqs": "4"}, "'max_num_seqs' must be `int`, got `str`"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_told_what_it_should_be(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^engine setting {message}"):
        EngineConfig.from_mapping({"model": "/m"} | settings)


def test_sampling_parameters_for_each_prompt() -> None:
    one, other = SamplingParams(n=2), SamplingParams()
    assert each_sampling(one, 2) == [one, one] and each_sampling([one, other], 2) == [one, other]
    wrong: list[Any] = [{"n": 2}, "greedy", 3, [one, {"n": 2}]]
    for params in wrong:
        with pytest.raises(InvalidRequestError, match="sampling_params must be SamplingParams"):
            each_sampling(params, 2)
