"""The keys of a Hugging Face checkpoint's JSON files that are read, under their own names. Torch-free."""

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from charonia.errors import ModelLoadError

CheckpointDtype = Literal["float32", "bfloat16", "float16"]
LayerType = Literal["full_attention", "sliding_attention"]


class HfGenerationConfig(msgspec.Struct, frozen=True):
    """generation_config.json. Unknown keys are ignored."""

    eos_token_id: int | list[int] | None = None


class HfConfig(msgspec.Struct, frozen=True, kw_only=True):
    """config.json. Unknown keys are ignored; null and absent mean the same wherever the type admits None."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 2
    position_embedding_type: str | None = None
    is_decoder: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10_000.0
    rope_local_base_freq: float = 10_000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    sliding_window_pattern: int | None = None
    layer_types: list[LayerType] | None = None
    use_bidirectional_attention: bool | None = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    dtype: CheckpointDtype | None = None
    torch_dtype: CheckpointDtype | None = None

    @property
    def kv_heads(self) -> int:
        """Key/value heads; one per query head if not stated."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of one head; an even share of the hidden size if not stated."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def validate(self, activation: str) -> None:
        """Refuse what the model code does not compute, rather than serve a model that is subtly another one.

        Args:
            activation: the only one that the architecture computes.

        Raises:
            ModelLoadError: names the key and its value.
        """
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelLoadError(f"config.json: {name!r} must be positive, got {value}")
        if self.num_attention_heads % self.kv_heads:
            raise ModelLoadError(
                f"config.json: 'num_attention_heads' ({self.num_attention_heads}) must be a multiple of "
                f"'num_key_value_heads' ({self.kv_heads})"
            )
        if self.head_size % 2:
            raise ModelLoadError(f"config.json: the head dimension must be even, got {self.head_size}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ModelLoadError(
                f"config.json: 'layer_types' lists {len(self.layer_types)} layers, but "
                f"'num_hidden_layers' is {self.num_hidden_layers}"
            )
        stated = self.hidden_activation or self.hidden_act or activation
        if stated != activation:
            raise ModelLoadError(
                f"config.json: activation {stated!r} is not supported; the architecture's is {activation!r}"
            )
        if self.use_bidirectional_attention:
            raise ModelLoadError("config.json: 'use_bidirectional_attention' is not supported")
        if self.quantization_config is not None:
            method = self.quantization_config.get("quant_method", "unknown")
            raise ModelLoadError(f"config.json: quantised checkpoints (method {method!r}) are not supported")


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "num_key_value_heads",
    "head_dim",
    "type_vocab_size",
    "sliding_window",
    "sliding_window_pattern",
)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ModelLoadError` that names the file if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"no {path.name} in {str(path.parent)!r}: not a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{str(path)!r} must hold a JSON object")
    return values
