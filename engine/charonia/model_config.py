"""What a checkpoint's config.json says about its model, in the engine's terms. Torch-free, for the frontends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
from charonia.errors import ModelLoadError
from charonia.rope_config import RopeConfig, parse_rope

CheckpointDtype = Literal["float32", "bfloat16", "float16"]


class LayerConfig(msgspec.Struct, frozen=True):
    """What differs between the layers of one model."""

    rope: RopeConfig
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it; all of them if None."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only model. Every field is resolved: defaults of the architecture are filled in."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerConfig, ...]
    max_position: int
    """Context length in tokens."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    """The output head is the embedding matrix."""
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    attention_scale: float
    """Multiplies q·k."""
    attention_soft_cap: float | None
    final_soft_cap: float | None
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence: those of generation_config.json, then those of config.json."""
    bos_token_id: int | None
    dtype: CheckpointDtype | None
    """As config.json states it; None if it does not."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, and generation_config.json if there is one, of a checkpoint's directory.

        Raises:
            ModelLoadError: no config.json, an unsupported architecture or option, or a bad value; it is named.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelLoadError(f"model directory {str(directory)!r} does not exist")
        values = _read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        return parse_model_config(values, _read_json(generation) if generation.is_file() else {})


def parse_model_config(values: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """Turn the contents of config.json (and generation_config.json) into a `ModelConfig`.

    Raises:
        ModelLoadError: as `ModelConfig.from_dir`.
    """
    architecture, family = _family(values)
    try:
        raw = msgspec.convert({**family.defaults, **values}, _RawConfig)
        stop = msgspec.convert(generation or {}, _RawGenerationConfig)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"config.json: {error}") from None
    _validate(raw, family)
    head_dim = raw.head_dim or raw.hidden_size // raw.num_attention_heads
    layers = family.layers(raw)
    eos = dict.fromkeys((*_as_tuple(stop.eos_token_id), *_as_tuple(raw.eos_token_id)))
    return ModelConfig(
        architecture=architecture,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_heads=raw.num_attention_heads,
        num_kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=head_dim,
        vocab_size=raw.vocab_size,
        layers=layers,
        max_position=family.max_position(raw, layers),
        rms_norm_eps=raw.rms_norm_eps,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias if family.qkv_bias is None else family.qkv_bias,
        attention_out_bias=raw.attention_bias,
        mlp_bias=raw.mlp_bias,
        attention_scale=(raw.query_pre_attn_scalar or head_dim) ** -0.5,
        attention_soft_cap=raw.attn_logit_softcapping,
        final_soft_cap=raw.final_logit_softcapping,
        eos_token_ids=tuple(eos),
        bos_token_id=raw.bos_token_id,
        dtype=raw.dtype or raw.torch_dtype,
    )


class _RawConfig(msgspec.Struct, kw_only=True):
    """The keys of config.json that are read, under their own names. Unknown keys are ignored."""

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
    sliding_window_pattern: int | None = 6
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    use_bidirectional_attention: bool | None = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    dtype: CheckpointDtype | None = None
    torch_dtype: CheckpointDtype | None = None


class _RawGenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _Family(msgspec.Struct, frozen=True, kw_only=True):
    """How one architecture reads its config.json."""

    model_type: str
    layers: Callable[[_RawConfig], tuple[LayerConfig, ...]]
    activation: str = "silu"
    qkv_bias: bool | None = None
    """Fixed by the architecture; `attention_bias` decides if None."""
    defaults: dict[str, Any] = {}
    """Values of keys that config.json may leave out and that differ from `_RawConfig`'s."""

    def max_position(self, raw: _RawConfig, layers: tuple[LayerConfig, ...]) -> int:
        """Context length; Gemma 3 alone states the length that its linear scaling already reaches."""
        if self.model_type == "gemma3_text":
            return raw.max_position_embeddings
        return layers[0].rope.max_position(raw.max_position_embeddings)


def _flat_rope(raw: _RawConfig) -> RopeConfig:
    """The one rope of a model whose layers all share it."""
    parameters = dict(raw.rope_scaling or raw.rope_parameters or {})
    return _rope(raw, parameters, raw.rope_theta)


def _rope(raw: _RawConfig, parameters: dict[str, Any], default_theta: float) -> RopeConfig:
    if raw.partial_rotary_factor is not None:
        parameters.setdefault("partial_rotary_factor", raw.partial_rotary_factor)
    if raw.original_max_position_embeddings is not None:
        parameters["original_max_position_embeddings"] = raw.original_max_position_embeddings
    return parse_rope(
        parameters, default_theta=default_theta, max_position_embeddings=raw.max_position_embeddings
    )


def _llama_layers(raw: _RawConfig) -> tuple[LayerConfig, ...]:
    return (LayerConfig(_flat_rope(raw)),) * raw.num_hidden_layers


def _mistral_layers(raw: _RawConfig) -> tuple[LayerConfig, ...]:
    return (LayerConfig(_flat_rope(raw), raw.sliding_window),) * raw.num_hidden_layers


def _qwen_layers(raw: _RawConfig) -> tuple[LayerConfig, ...]:
    """Windows on the layers from `max_window_layers` on, if `use_sliding_window`; `layer_types` wins."""
    rope = _flat_rope(raw)
    window = raw.sliding_window if raw.use_sliding_window else None
    types = raw.layer_types or [
        "sliding_attention" if index >= raw.max_window_layers else "full_attention"
        for index in range(raw.num_hidden_layers)
    ]
    return tuple(LayerConfig(rope, window if kind == "sliding_attention" else None) for kind in types)


def _gemma3_layers(raw: _RawConfig) -> tuple[LayerConfig, ...]:
    """Local layers have a window and a rope of their own; each `sliding_window_pattern`-th layer is global."""
    parameters = raw.rope_parameters or {}
    scaled = {**(parameters.get("full_attention") or {}), **(raw.rope_scaling or {})}
    full = LayerConfig(_rope(raw, scaled, raw.rope_theta))
    local = dict(parameters.get("sliding_attention") or {})
    sliding = LayerConfig(_rope(raw, local, raw.rope_local_base_freq), raw.sliding_window)
    pattern = raw.sliding_window_pattern or 6
    types = raw.layer_types or [
        "sliding_attention" if (index + 1) % pattern else "full_attention"
        for index in range(raw.num_hidden_layers)
    ]
    return tuple(sliding if kind == "sliding_attention" else full for kind in types)


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        model_type="llama", layers=_llama_layers, defaults={"max_position_embeddings": 2048}
    ),
    "MistralForCausalLM": _Family(
        model_type="mistral",
        layers=_mistral_layers,
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": _Family(
        model_type="qwen2",
        layers=_qwen_layers,
        qkv_bias=True,
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": _Family(
        model_type="qwen3",
        layers=_qwen_layers,
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, "head_dim": 128},
    ),
    "Gemma3ForCausalLM": _Family(
        model_type="gemma3_text",
        layers=_gemma3_layers,
        activation="gelu_pytorch_tanh",
        defaults={
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "head_dim": 256,
            "rope_theta": 1_000_000.0,
            "query_pre_attn_scalar": 256.0,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


def _family(values: dict[str, Any]) -> tuple[str, _Family]:
    """The architecture's name and its reader; `model_type` decides where `architectures` is missing."""
    architectures = values.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else []:
        if name in _FAMILIES:
            return name, _FAMILIES[name]
    model_type = values.get("model_type")
    if not architectures:
        for name, family in _FAMILIES.items():
            if family.model_type == model_type:
                return name, family
    stated = (
        architectures[0]
        if isinstance(architectures, list) and architectures
        else f"model_type {model_type!r}"
    )
    raise ModelLoadError(
        f"architecture {stated} is not supported; supported architectures: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _validate(raw: _RawConfig, family: _Family) -> None:
    """Refuse what the model code does not compute, rather than serve a model that is subtly another one."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern")  # fmt: skip
    for name in sizes:
        value = getattr(raw, name)
        if value is not None and value < 1:
            raise ModelLoadError(f"config.json: {name!r} must be positive, got {value}")
    if raw.num_attention_heads % (raw.num_key_value_heads or raw.num_attention_heads):
        raise ModelLoadError(
            f"config.json: 'num_attention_heads' ({raw.num_attention_heads}) must be a multiple of "
            f"'num_key_value_heads' ({raw.num_key_value_heads})"
        )
    if (raw.head_dim or raw.hidden_size // raw.num_attention_heads) % 2:
        raise ModelLoadError("config.json: the head dimension must be even")
    if raw.layer_types is not None and len(raw.layer_types) != raw.num_hidden_layers:
        raise ModelLoadError(
            f"config.json: 'layer_types' names {len(raw.layer_types)} layers, 'num_hidden_layers' says "
            f"{raw.num_hidden_layers}"
        )
    activation = raw.hidden_activation or raw.hidden_act or family.activation
    if activation != family.activation:
        raise ModelLoadError(
            f"config.json: activation {activation!r} is not supported; supported: {family.activation!r}"
        )
    if raw.use_bidirectional_attention:
        raise ModelLoadError("config.json: 'use_bidirectional_attention' is not supported")
    if raw.quantization_config is not None:
        method = raw.quantization_config.get("quant_method", "unknown")
        raise ModelLoadError(f"config.json: quantised checkpoints (method {method!r}) are not supported")


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"{str(path.parent)!r} holds no {path.name}: not a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{str(path)!r} must hold a JSON object")
    return values
