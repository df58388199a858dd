"""What the decoder-only models have in common: attention, gated MLP, and the stack around the layers.

The residual stream is one buffer, which every block reads through its norm and adds to in place:

    residual   x0 ──────────(+)──────────────(+)────────────  ...
                 └ norm ─ attn ┘└ norm ─ mlp ┘

Norms are part of the projection behind them, additions part of the one before them (`Linear`), so that a kernel can
fuse the three.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from charonia.model_config import ModelConfig
from charonia.models.attention import AttentionContext, AttentionSpec
from charonia.models.layers import Embedding, Linear, RMSNorm, WeightBuilder


class Attention:
    """Grouped-query attention (Ainslie et al., 2023), rotary positions and, if asked for, normed q and k."""

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        weights: WeightBuilder,
        prefix: str,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        """Allocate the projections `prefix.{q,k,v,o}_proj`. The norms, if any, are per head: `[head_dim]`."""
        layer = config.layers[layer_idx]
        self.spec = AttentionSpec(
            layer_idx=layer_idx,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            sliding_window=layer.sliding_window,
            soft_cap=config.attention_soft_cap,
        )
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = weights.linear(
            prefix,
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
        )
        self.o_proj = weights.linear(
            prefix, q_size, {"o_proj": config.hidden_size}, bias=config.attention_out_bias
        )
        self.cos_sin_cache = weights.rope(layer.rope, config.head_dim)
        self.q_norm_weight = None if q_norm is None else q_norm.weight
        self.k_norm_weight = None if k_norm is None else k_norm.weight
        self.eps = config.rms_norm_eps

    def heads(
        self, norm: RMSNorm, residual: torch.Tensor, positions: torch.Tensor, attn: AttentionContext
    ) -> torch.Tensor:
        """What the heads bring of `norm(residual [T, H])`: `[T, num_heads * head_dim]`, not yet projected."""
        qkv = self.qkv_proj.of_normed(norm, residual)
        return attn.attend(
            self.spec, qkv, positions, self.cos_sin_cache, self.q_norm_weight, self.k_norm_weight, self.eps
        )


class GatedMLP:
    """`down(act(gate(x)) * up(x))` (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, weights: WeightBuilder, prefix: str) -> None:
        """Allocate `prefix.{gate,up,down}_proj`."""
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = weights.linear(
            prefix, hidden, {"gate_proj": inner, "up_proj": inner}, bias=config.mlp_bias
        )
        self.down_proj = weights.linear(prefix, inner, {"down_proj": hidden}, bias=config.mlp_bias)


class DecoderLayer(Protocol):
    """One layer of the stack."""

    attention: Attention

    def __call__(self, residual: torch.Tensor, positions: torch.Tensor, attn: AttentionContext) -> None:
        """Add what the layer's blocks bring to `residual [T, H]`, in place."""
        ...


class PreNormLayer:
    """Attention and SiLU-gated MLP, each behind its own norm: Llama's layer, and that of most models since."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(self, residual: torch.Tensor, positions: torch.Tensor, attn: AttentionContext) -> None:
        """As `DecoderLayer`."""
        heads = self.attention.heads(self.input_norm, residual, positions, attn)
        self.attention.o_proj.add_to(residual, heads)
        gated = self.mlp.gate_up_proj.silu_mul_of_normed(self.mlp_norm, residual)
        self.mlp.down_proj.add_to(residual, gated)


class CausalLM:
    """A decoder-only language model: token ids and positions in, hidden states out, logits on demand.

    It keeps no state between calls and takes all that a step needs as arguments.
    """

    def __init__(
        self,
        embed_tokens: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        lm_head: Linear,
        final_soft_cap: float | None = None,
    ) -> None:
        """`final_soft_cap`: logits become `cap * tanh(logits / cap)`."""
        self.embed_tokens = embed_tokens
        self.layers = tuple(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.final_soft_cap = final_soft_cap

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attn: AttentionContext
    ) -> torch.Tensor:
        """Run the stack.

        Args:
            input_ids: `[T]` integers, the tokens of all sequences, one after the other.
            positions: `[T]` integers, of each token in its sequence.
            attn: the step's attention; it writes the KV cache.

        Returns:
            `[T, H]` hidden states in front of the final norm, in the model's dtype.
        """
        residual = self.embed_tokens(input_ids)
        for layer in self.layers:
            layer(residual, positions, attn)
        return residual

    def sketch(self) -> "CausalLM":
        """The same model with one layer of each kind: it launches whatever kernels the whole one launches."""
        kinds = {replace(layer.attention.spec, layer_idx=0): layer for layer in reversed(self.layers)}
        return CausalLM(self.embed_tokens, list(kinds.values()), self.norm, self.lm_head, self.final_soft_cap)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[N, H]` hidden states to `[N, vocab_size]` logits, in the model's dtype."""
        logits = self.lm_head.of_normed(self.norm, hidden)
        if self.final_soft_cap is None:
            return logits
        return (torch.tanh(logits.float() / self.final_soft_cap) * self.final_soft_cap).to(logits.dtype)


def pre_norm_lm(
    config: ModelConfig, weights: WeightBuilder, attention: Callable[[int, str], Attention]
) -> CausalLM:
    """A stack of `PreNormLayer`s with SiLU-gated MLPs, under the names that Llama gave its tensors.

    Args:
        config: the model.
        weights: allocates the parameters and records where the checkpoint's tensors go.
        attention: makes the attention of a layer from its index and the prefix of its tensors.
    """

    def norm(name: str) -> RMSNorm:
        return weights.norm(name, config.hidden_size, config.rms_norm_eps)

    def layer(layer_idx: int) -> PreNormLayer:
        prefix = f"model.layers.{layer_idx}"
        return PreNormLayer(
            input_norm=norm(f"{prefix}.input_layernorm"),
            attention=attention(layer_idx, f"{prefix}.self_attn"),
            mlp_norm=norm(f"{prefix}.post_attention_layernorm"),
            mlp=GatedMLP(config, weights, f"{prefix}.mlp"),
        )

    embed_tokens = weights.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
    return CausalLM(
        embed_tokens=embed_tokens,
        layers=[layer(layer_idx) for layer_idx in range(config.num_layers)],
        norm=norm("model.norm"),
        lm_head=weights.lm_head(embed_tokens, tied=config.tie_word_embeddings),
        final_soft_cap=config.final_soft_cap,
    )
