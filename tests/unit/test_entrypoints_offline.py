"""What `LLM` makes of vLLM's arguments, of a checkpoint's recommended sampling, and of wrong values."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from charonia.config import EngineConfig
from charonia.entrypoints.offline_settings import each_sampling, offline_config, recommended_sampling
from charonia.errors import ConfigError, InvalidRequestError, ModelLoadError
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


def test_a_checkpoint_recommends_how_to_sample(tmp_path: Path) -> None:
    assert recommended_sampling(str(tmp_path)) == SamplingParams()
    generation = {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "max_new_tokens": 64, "do_sample": True,
        "eos_token_id": [1, 2],
    }  # fmt: skip
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(generation))
    expected = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_tokens=64)
    assert recommended_sampling(str(tmp_path)) == expected
    file.write_text('{"temperature": -1}')
    with pytest.raises(ModelLoadError, match=r"generation_config.json: .*'temperature'"):
        recommended_sampling(str(tmp_path))


def test_sampling_parameters_for_each_prompt() -> None:
    one, other = SamplingParams(n=2), SamplingParams()
    assert each_sampling(one, 2) == [one, one] and each_sampling([one, other], 2) == [one, other]
    wrong: list[Any] = [{"n": 2}, "greedy", 3, [one, {"n": 2}]]
    for params in wrong:
        with pytest.raises(InvalidRequestError, match="sampling_params must be SamplingParams"):
            each_sampling(params, 2)
