"""vLLM's engine arguments in 1/model.json: renamed, ignored with a warning, checked, or refused by name."""

from typing import Any

import msgspec
import pytest
from charonia.config import EngineConfig
from charonia.errors import ConfigError
from charonia.triton.vllm_arguments import ONLY_WITH, WITHOUT_EFFECT, read_vllm_arguments


def read(**values: Any) -> EngineConfig:
    return EngineConfig.from_mapping(read_vllm_arguments({"model": "/m"} | values).settings)


def test_known_settings_pass_and_null_is_the_default() -> None:
    arguments = read_vllm_arguments({"model": "/m", "max_num_seqs": 4, "quantization": None, "seed": None})
    assert arguments.settings == {"model": "/m", "max_num_seqs": 4}
    assert arguments.warnings == ()
    assert read(max_num_seqs=4, seed=None, revision=None) == EngineConfig(model="/m", max_num_seqs=4)


def test_other_spellings() -> None:
    assert read(dtype="half").dtype == "float16"
    assert read(dtype="float").dtype == "float32"
    assert read(enable_lora="False").enable_lora is False
    assert read(num_gpu_blocks_override=10).num_kv_blocks_override == 10
    assert read(num_kv_blocks_override=5, num_gpu_blocks_override=10).num_kv_blocks_override == 5


def test_settings_without_effect_are_named_in_a_warning() -> None:
    arguments = read_vllm_arguments({"model": "/m", "swap_space": 4, "disable_log_requests": True})
    assert arguments.settings == {"model": "/m"}
    swap, log = arguments.warnings
    assert "'swap_space' is ignored" in swap
    assert "'disable_log_requests' is ignored" in log


@pytest.mark.parametrize("key", sorted(ONLY_WITH))
def test_what_may_change_answers_is_taken_with_our_value_alone(key: str) -> None:
    for value in ONLY_WITH[key].values:
        assert read(**{key: value}) == EngineConfig(model="/m")
    with pytest.raises(ConfigError, match=f"'{key}'"):
        read(**{key: "something else"})


def test_types_are_not_mixed_up() -> None:
    assert read(cpu_offload_gb=0.0) == EngineConfig(model="/m")
    for key, value in {
        "trust_remote_code": 0,
        "trust_remote_code ": False,
        "pipeline_parallel_size": True,
    }.items():
        with pytest.raises(ConfigError):
            read(**{key: value})


def test_remote_code_is_refused_in_plain_words() -> None:
    with pytest.raises(
        ConfigError, match="'trust_remote_code' must be False, got True: code that comes with"
    ):
        read(trust_remote_code=True)


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown engine setting 'invalid_attribute'"):
        read(invalid_attribute=True)


def test_no_setting_has_two_meanings() -> None:
    known = {field.name for field in msgspec.structs.fields(EngineConfig)}
    assert not (WITHOUT_EFFECT.keys() | ONLY_WITH.keys()) & known
    assert not WITHOUT_EFFECT.keys() & ONLY_WITH.keys()
