"""A checkpoint's model in the engine's terms, read from its config.json. Torch-free: frontends read it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from charonia.errors import ModelLoadError
from charonia.generation_config import recommended_sampling
from charonia.hf_config import CheckpointDtype, HfConfig, HfGenerationConfig, LayerType, read_json_object
from charonia.pooling_params import PoolingConfig, PoolingType
from charonia.rope_config import RopeConfig, parse_rope
from charonia.sentence_transformers import read_sentence_encoder


class LayerConfig(msgspec.Struct, frozen=True):
    """What differs between the layers of one model."""

    rope: RopeConfig
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it; all of them if None."""


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What only encoders have. num_positions: learned ones; `max_position` may be fewer."""

    layer_norm_eps: float
    type_vocab_size: int
    num_positions: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only model, or one encoder. Every field is resolved: defaults of the architecture are filled in."""

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
    recommended_sampling: dict[str, Any] = {}
    """Sampling parameters that generation_config.json recommends."""
    pooling: PoolingConfig = PoolingConfig()
    """How the model makes embeddings, unless a request says otherwise."""
    encoder: EncoderConfig | None = None
    """Set for encoders: they only embed. Their positions are learned, the layers' ropes without effect."""

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""
        return self.encoder is None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, and generation_config.json if there is one, of a checkpoint's directory.

        Raises:
            ModelLoadError: no config.json, or an unsupported architecture or value, which is named.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelLoadError(
                f"model directory {str(directory)!r} does not exist; models are local Hugging Face directories, and "
                "none is downloaded by its name"
            )
        values = read_json_object(directory / "config.json")
        generation = directory / "generation_config.json"
        config = parse_model_config(values, read_json_object(generation) if generation.is_file() else {})
        sentences = read_sentence_encoder(directory, values, config.pooling.pooling_type)
        length = config.max_position
        if not config.generates and sentences.max_length is not None:
            length = min(length, sentences.max_length)
        return msgspec.structs.replace(config, pooling=sentences.pooling, max_position=length)


def parse_model_config(values: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Turn the contents of config.json and generation_config.json into a `ModelConfig`.

    Raises:
        ModelLoadError: as `ModelConfig.from_dir`.
    """
    architecture = _architecture(values)
    family = _FAMILIES[architecture]
    try:
        raw = msgspec.convert({**family.defaults, **values}, HfConfig)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"config.json: {error}") from None
    try:
        ends = msgspec.convert(generation, HfGenerationConfig)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"generation_config.json: {error}") from None
    raw.validate(family.activation)
    layers = family.layers(raw)
    return ModelConfig(
        architecture=architecture,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_heads=raw.num_attention_heads,
        num_kv_heads=raw.kv_heads,
        head_dim=raw.head_size,
        vocab_size=raw.vocab_size,
        layers=layers,
        max_position=family.max_position(raw, layers),
        rms_norm_eps=raw.rms_norm_eps,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias or family.always_qkv_bias,
        attention_out_bias=raw.attention_bias,
        mlp_bias=raw.mlp_bias,
        attention_scale=(raw.query_pre_attn_scalar or raw.head_size) ** -0.5,
        attention_soft_cap=raw.attn_logit_softcapping,
        final_soft_cap=raw.final_logit_softcapping,
        eos_token_ids=tuple(dict.fromkeys((*_ids(ends.eos_token_id), *_ids(raw.eos_token_id)))),
        bos_token_id=raw.bos_token_id,
        recommended_sampling=recommended_sampling(generation),
        dtype=raw.dtype or raw.torch_dtype,
        pooling=PoolingConfig(pooling_type=family.pooling_type),
        encoder=family.encoder(raw) if family.encoder else None,
    )


class _Family(msgspec.Struct, frozen=True, kw_only=True):
    """How one architecture reads its config.json."""

    model_type: str
    layers: Callable[[HfConfig], tuple[LayerConfig, ...]]
    activation: str = "silu"
    always_qkv_bias: bool = False
    pooling_type: PoolingType = "last"
    encoder: Callable[[HfConfig], EncoderConfig] | None = None
    states_scaled_length: bool = False
    """`max_position_embeddings` is the length that rope scaling reaches, not the one that it starts from."""
    defaults: dict[str, Any]
    """Values of keys that config.json may leave out and that differ from `HfConfig`'s."""

    def max_position(self, raw: HfConfig, layers: tuple[LayerConfig, ...]) -> int:
        """Context length in tokens."""
        if self.states_scaled_length:
            return raw.max_position_embeddings
        return layers[0].rope.max_position(raw.max_position_embeddings)


def _rope(raw: HfConfig, parameters: dict[str, Any], theta: float) -> RopeConfig:
    """One rope from its own parameters and from what config.json states beside them."""
    if raw.partial_rotary_factor is not None:
        parameters = {"partial_rotary_factor": raw.partial_rotary_factor, **parameters}
    if raw.original_max_position_embeddings is not None:
        stated = raw.original_max_position_embeddings
        parameters = {**parameters, "original_max_position_embeddings": stated}
    return parse_rope(parameters, theta=theta, max_position_embeddings=raw.max_position_embeddings)


def _shared_rope(raw: HfConfig) -> RopeConfig:
    """The one rope of a model whose layers all use it."""
    return _rope(raw, raw.rope_scaling or raw.rope_parameters or {}, raw.rope_theta)


def _llama_layers(raw: HfConfig) -> tuple[LayerConfig, ...]:
    return (LayerConfig(_shared_rope(raw)),) * raw.num_hidden_layers


def _mistral_layers(raw: HfConfig) -> tuple[LayerConfig, ...]:
    return (LayerConfig(_shared_rope(raw), raw.sliding_window),) * raw.num_hidden_layers


def _qwen_layers(raw: HfConfig) -> tuple[LayerConfig, ...]:
    """Windows on the layers from `max_window_layers` on, if `use_sliding_window`; `layer_types` wins."""
    rope = _shared_rope(raw)
    full = LayerConfig(rope)
    sliding = LayerConfig(rope, raw.sliding_window) if raw.use_sliding_window else full
    full_layers = min(raw.max_window_layers, raw.num_hidden_layers)
    if raw.layer_types is not None:
        return _by_type(raw.layer_types, full, sliding)
    return (full,) * full_layers + (sliding,) * (raw.num_hidden_layers - full_layers)


def _gemma3_layers(raw: HfConfig) -> tuple[LayerConfig, ...]:
    """Local layers have a window and a rope of their own; scaling applies to the global ones' only."""
    parameters = raw.rope_parameters or {}
    for_full = {**(parameters.get("full_attention") or {}), **(raw.rope_scaling or {})}
    for_sliding = parameters.get("sliding_attention") or {}
    full = LayerConfig(_rope(raw, for_full, raw.rope_theta))
    sliding = LayerConfig(_rope(raw, for_sliding, raw.rope_local_base_freq), raw.sliding_window)
    if raw.layer_types is not None:
        return _by_type(raw.layer_types, full, sliding)
    pattern = raw.sliding_window_pattern or 6
    return tuple(full if (index + 1) % pattern == 0 else sliding for index in range(raw.num_hidden_layers))


def _bert_encoder(raw: HfConfig) -> EncoderConfig:
    if raw.position_embedding_type not in (None, "absolute"):
        raise ModelLoadError(
            f"config.json: 'position_embedding_type' {raw.position_embedding_type!r} is not supported"
        )
    if raw.is_decoder:
        raise ModelLoadError("config.json: 'is_decoder' is not supported for this architecture")
    return EncoderConfig(
        layer_norm_eps=raw.layer_norm_eps,
        type_vocab_size=raw.type_vocab_size,
        num_positions=raw.max_position_embeddings,
    )


def _by_type(types: list[LayerType], full: LayerConfig, sliding: LayerConfig) -> tuple[LayerConfig, ...]:
    return tuple(sliding if kind == "sliding_attention" else full for kind in types)


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        model_type="llama",
        layers=_llama_layers,
        defaults={"max_position_embeddings": 2048},
    ),
    "MistralForCausalLM": _Family(
        model_type="mistral",
        layers=_mistral_layers,
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": _Family(
        model_type="qwen2",
        layers=_qwen_layers,
        always_qkv_bias=True,
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
        states_scaled_length=True,
        defaults={
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "head_dim": 256,
            "rope_theta": 1_000_000.0,
            "query_pre_attn_scalar": 256.0,
            "tie_word_embeddings": True,
        },
    ),
    "BertModel": _Family(
        model_type="bert",
        layers=_llama_layers,
        activation="gelu",
        pooling_type="cls",
        encoder=_bert_encoder,
        defaults={"max_position_embeddings": 512},
    ),
}

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)
"""Names in the `architectures` of config.json."""


def _architecture(values: dict[str, Any]) -> str:
    """The first supported name of `architectures`; where there are none, the one of `model_type`."""
    stated = values.get("architectures") or []
    if not isinstance(stated, list):
        raise ModelLoadError(f"config.json: 'architectures' must be a list of names, got {stated!r}")
    model_type = values.get("model_type")
    for name, family in _FAMILIES.items():
        if name in stated or (not stated and model_type == family.model_type):
            return name
    described = ", ".join(map(str, stated)) or f"of model_type {model_type!r}"
    raise ModelLoadError(
        f"architecture {described} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
