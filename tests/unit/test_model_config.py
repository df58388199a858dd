"""config.json, resolved: defaults of each architecture, stop tokens, context lengths, errors that name the cause."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from charonia.errors import ModelLoadError
from charonia.model_config import SUPPORTED_ARCHITECTURES, ModelConfig, parse_model_config
from charonia.rope_config import LinearScaling, Llama3Scaling, YarnScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return parse_model_config({**LLAMA, **changes}, generation or {})


def error_of(**changes: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        parse(**changes)
    return str(caught.value)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.sliding_window for layer in config.layers]


def test_llama_defaults() -> None:
    config = parse()
    assert (config.head_dim, config.num_layers, config.max_position) == (16, 3, 4096)
    assert config.attention_scale == 0.25
    assert config.rms_norm_eps == 1e-6
    assert not (config.tie_word_embeddings or config.qkv_bias or config.attention_out_bias or config.mlp_bias)
    assert config.layers[0].rope.theta == 10000.0
    assert windows(config) == [None] * 3
    assert config.dtype is None
    assert parse(num_key_value_heads=None).num_kv_heads == 4


def test_qwen2_has_biases_on_q_k_v_only() -> None:
    config = parse(architectures=["Qwen2ForCausalLM"])
    assert config.qkv_bias and not config.attention_out_bias


def test_gemma3_defaults() -> None:
    config = parse(architectures=["Gemma3ForCausalLM"], num_hidden_layers=7, query_pre_attn_scalar=64)
    assert config.tie_word_embeddings
    assert config.head_dim == 256
    assert config.attention_scale == 0.125
    assert windows(config) == [4096] * 5 + [None, 4096]
    assert [layer.rope.theta for layer in config.layers[4:6]] == [1e4, 1e6]


def test_mistral_windows() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert windows(parse(**mistral)) == [4096] * 3
    assert windows(parse(**mistral, sliding_window=None)) == [None] * 3


def test_qwen_windows_start_at_max_window_layers_if_used() -> None:
    qwen = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "max_window_layers": 2}
    assert windows(parse(**qwen)) == [None] * 3
    assert windows(parse(**qwen, use_sliding_window=True)) == [None, None, 8]


def test_architecture_from_model_type_alone() -> None:
    assert parse(architectures=None, model_type="gemma3_text").architecture == "Gemma3ForCausalLM"


def test_eos_of_both_files_without_repeats() -> None:
    assert parse(eos_token_id=2).eos_token_ids == (2,)
    assert parse({"eos_token_id": [7, 2]}, eos_token_id=2).eos_token_ids == (7, 2)
    assert parse().eos_token_ids == ()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_under_its_newer_and_older_name(key: str) -> None:
    assert parse(**{key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("rope", "scaling", "max_position"),
    [
        ({"type": "linear", "factor": 4}, LinearScaling(4.0), 16384),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            Llama3Scaling(8.0, 1.0, 4.0, 4096),
            4096,
        ),
        ({"type": "yarn", "factor": 4.0}, YarnScaling(4.0, 4096, 1.138629436, 32.0, 1.0, True), 16384),
        (
            {
                "type": "yarn",
                "original_max_position_embeddings": 1024,
                "attention_factor": 1.5,
                "truncate": False,
            },
            YarnScaling(4.0, 1024, 1.5, 32.0, 1.0, False),
            4096,
        ),
        ({"type": "default"}, None, 4096),
    ],
)
def test_rope_scaling_and_context_length(rope: dict[str, Any], scaling: Any, max_position: int) -> None:
    config = parse(rope_scaling=rope, rope_theta=5000)
    assert config.layers[0].rope.theta == 5000.0
    assert config.max_position == max_position
    found = config.layers[0].rope.scaling
    if isinstance(scaling, YarnScaling):
        assert isinstance(found, YarnScaling)
        assert found.attention_factor == pytest.approx(scaling.attention_factor)
        assert (found.factor, found.original_max_position_embeddings) == (
            scaling.factor,
            scaling.original_max_position_embeddings,
        )
        assert found.truncate == scaling.truncate
    else:
        assert found == scaling


def test_gemma3_states_the_length_that_scaling_reaches() -> None:
    config = parse(
        architectures=["Gemma3ForCausalLM"],
        num_hidden_layers=6,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert config.max_position == 4096
    assert config.layers[5].rope.scaling == LinearScaling(8.0)
    assert config.layers[0].rope.scaling is None


def test_unsupported_architecture_names_those_supported() -> None:
    message = error_of(architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel" in message
    assert all(name in message for name in SUPPORTED_ARCHITECTURES)
    assert "'gpt2'" in error_of(architectures=[], model_type="gpt2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head dimension"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"dtype": "float8"}, "dtype"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "low_freq_factor",
        ),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], named: str) -> None:
    assert named in error_of(**changes)


def test_missing_size_is_named() -> None:
    with pytest.raises(ModelLoadError, match="vocab_size"):
        parse_model_config({key: value for key, value in LLAMA.items() if key != "vocab_size"}, {})


def test_from_dir(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)
    with pytest.raises(ModelLoadError, match="does not exist"):
        ModelConfig.from_dir(tmp_path / "away")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert ModelConfig.from_dir(tmp_path) == parse({"eos_token_id": 9})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "nine"}')
    with pytest.raises(ModelLoadError, match=r"generation_config\.json.*eos_token_id"):
        ModelConfig.from_dir(tmp_path)
    for content in (b"{", b"[]", b'{"a": "\xff"}'):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            ModelConfig.from_dir(tmp_path)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, charonia.model_config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_recommends_how_to_sample() -> None:
    stated = {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "max_new_tokens": 64, "do_sample": True,
        "eos_token_id": [1, 2],
    }  # fmt: skip
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 64}
    assert parse(stated).recommended_sampling == expected
    # Nobody could ask for this, and a model is not refused for it.
    assert parse({"top_p": 0, "top_k": "many", "repetition_penalty": 1.1}).recommended_sampling == {
        "repetition_penalty": 1.1
    }
