"""Gemma 3, text (Gemma Team, 2025): normed q and k, a norm on either side of each block, scaled embeddings.

Local layers see a sliding window through a rope of their own; every few layers one sees everything. All norm
weights are stored less one.
"""

import torch
from charonia_kernels import gelu_tanh_mul

from charonia.model_config import ModelConfig
from charonia.models.attention import AttentionContext
from charonia.models.decoder import Attention, CausalLM, GatedMLP
from charonia.models.layers import RMSNorm, WeightBuilder


class Gemma3Layer:
    """Attention and MLP, each between two norms."""

    def __init__(self, config: ModelConfig, layer_idx: int, weights: WeightBuilder) -> None:
        """Allocate the weights `model.layers.{layer_idx}.*`."""
        prefix = f"model.layers.{layer_idx}"
        self.input_norm = _norm(config, weights, f"{prefix}.input_layernorm")
        self.attention = Attention(
            config,
            layer_idx,
            weights,
            f"{prefix}.self_attn",
            q_norm=_norm(config, weights, f"{prefix}.self_attn.q_norm", config.head_dim),
            k_norm=_norm(config, weights, f"{prefix}.self_attn.k_norm", config.head_dim),
        )
        self.post_attention_norm = _norm(config, weights, f"{prefix}.post_attention_layernorm")
        self.pre_mlp_norm = _norm(config, weights, f"{prefix}.pre_feedforward_layernorm")
        self.mlp = GatedMLP(config, weights, f"{prefix}.mlp")
        self.post_mlp_norm = _norm(config, weights, f"{prefix}.post_feedforward_layernorm")

    def __call__(self, residual: torch.Tensor, positions: torch.Tensor, attn: AttentionContext) -> None:
        """As `DecoderLayer`."""
        heads = self.attention.heads(self.input_norm, residual, positions, attn)
        attended = self.post_attention_norm(self.attention.o_proj(heads))
        normed = self.pre_mlp_norm.add(attended, residual)
        gated = gelu_tanh_mul(self.mlp.gate_up_proj(normed))
        residual += self.post_mlp_norm(self.mlp.down_proj(gated))


def gemma3(config: ModelConfig, weights: WeightBuilder) -> CausalLM:
    """`Gemma3ForCausalLM`."""
    embed_tokens = weights.embedding(
        "model.embed_tokens", config.vocab_size, config.hidden_size, scale=config.hidden_size**0.5
    )
    return CausalLM(
        embed_tokens=embed_tokens,
        layers=[Gemma3Layer(config, layer_idx, weights) for layer_idx in range(config.num_layers)],
        norm=_norm(config, weights, "model.norm"),
        lm_head=weights.lm_head(embed_tokens, tied=config.tie_word_embeddings),
        final_soft_cap=config.final_soft_cap,
    )


def _norm(config: ModelConfig, weights: WeightBuilder, name: str, size: int | None = None) -> RMSNorm:
    return weights.norm(name, size or config.hidden_size, config.rms_norm_eps, plus_one=True)
