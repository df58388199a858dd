"""Convert a Llama GGUF file into a Hugging Face model directory, without torch or transformers.

The weights are dequantised to float32: bfloat16 would drop mantissa bits of the float16 block scales.
Needs the packages of the ``convert`` extra.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

Float32Array = npt.NDArray[np.float32]

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Every file that `convert` writes."""

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ConversionError(ValueError):
    """The GGUF file is not a Llama model that this module can convert."""


@dataclass(frozen=True)
class _Shape:
    """The hyper-parameters of the model, as the GGUF header states them."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float


def convert(source: Path, target: Path, *, dtype: str) -> None:
    """Write the Hugging Face files of the Llama model in ``source`` into the directory ``target``.

    Args:
        source: a GGUF file of architecture ``llama`` with a byte-level BPE tokenizer.
        target: an existing directory; receives `MODEL_FILES`.
        dtype: the precision the model is meant to run in, recorded in ``config.json``; the stored weights are
            float32 whatever this says.

    Raises:
        ConversionError: another architecture or tokenizer, or a tensor this module does not know.
        OSError: the files cannot be written.
    """
    reader = gguf.GGUFReader(source)
    shape = _read_shape(reader)
    weights = _read_weights(reader.tensors, shape)
    _save_weights(weights, target / "model.safetensors")
    bos, eos, pad, unk = (
        _field(reader, f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "padding", "unknown")
    )
    token_ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    tied = "lm_head.weight" not in weights
    _write_json(target / "config.json", _config(shape, tied=tied, dtype=dtype) | token_ids)
    _write_json(target / "generation_config.json", {"_from_model_config": True} | token_ids)
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    special = {f"{k}_token": tokens[i] for k, i in (("bos", bos), ("eos", eos), ("pad", pad), ("unk", unk))}
    _write_json(target / "special_tokens_map.json", special)
    _write_json(target / "tokenizer.json", _tokenizer(reader, tokens))
    _write_json(
        target / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "chat_template": _field(reader, "tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_positions,
            # transformers' GPT2Tokenizer would replace the pre-tokenizer of tokenizer.json by its own.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        | special,
    )


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of one header field."""
    field = reader.get_field(key)
    if field is None:
        raise ConversionError(f"the GGUF header has no field {key!r}")
    return field.contents()


def _read_shape(reader: gguf.GGUFReader) -> _Shape:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ConversionError(
            f"only GGUF files of architecture 'llama' can be converted, not {architecture!r}"
        )
    hidden_size = _field(reader, "llama.embedding_length")
    num_heads = _field(reader, "llama.attention.head_count")
    return _Shape(
        hidden_size=hidden_size,
        num_layers=_field(reader, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden_size // num_heads,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        vocab_size=_field(reader, "llama.vocab_size"),
        max_positions=_field(reader, "llama.context_length"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        # The header holds a float32; seven digits are what it can mean.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.7g}"),
    )


def _read_weights(tensors: Iterable[gguf.ReaderTensor], shape: _Shape) -> dict[str, Float32Array]:
    """Dequantise every tensor, under its Hugging Face name and in its (out, in) layout."""
    weights: dict[str, Float32Array] = {}
    for tensor in tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.endswith("attn_q.weight"):
            weight = _split_rotary_halves(weight, shape.num_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = _split_rotary_halves(weight, shape.num_kv_heads)
        weights[_hugging_face_name(tensor.name)] = np.ascontiguousarray(weight)
    return weights


def _hugging_face_name(name: str) -> str:
    if name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[name]
    match name.split("."):
        case ["blk", layer, module, "weight"] if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.weight"
    raise ConversionError(f"unknown tensor {name!r}")


def _split_rotary_halves(weight: Float32Array, num_heads: int) -> Float32Array:
    """Undo GGUF's row order of Q and K: per head, rotary pairs (2i, 2i+1) become (i, i + head_dim/2).

    Args:
        weight: (num_heads * head_dim, hidden_size).
        num_heads: query or key heads.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _save_weights(weights: dict[str, Float32Array], path: Path) -> None:
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"writing {path.name}: {error}") from error
    path.chmod(0o644)  # save_file leaves 0600


def _config(shape: _Shape, *, tied: bool, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _tokenizer(reader: gguf.GGUFReader, tokens: list[str]) -> dict[str, Any]:
    """The ``tokenizer.json`` of a byte-level BPE that splits digits one by one."""
    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ConversionError(f"only the tokenizer ('gpt2', 'smollm') can be converted, not {kind}")
    control = int(gguf.TokenType.CONTROL)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i]} | flags
            for i, token_type in enumerate(_field(reader, "tokenizer.ggml.token_type"))
            if token_type == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _field(reader, "tokenizer.ggml.merges")],
        },
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
