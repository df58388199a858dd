"""Qwen3 (Yang et al., 2025): Llama with q and k normed per head, in front of the rotation."""

from charonia.model_config import ModelConfig
from charonia.models.decoder import Attention, CausalLM, pre_norm_lm
from charonia.models.layers import WeightBuilder


def qwen3(config: ModelConfig, weights: WeightBuilder) -> CausalLM:
    """`Qwen3ForCausalLM`."""

    def attention(layer_idx: int, prefix: str) -> Attention:
        return Attention(
            config,
            layer_idx,
            weights,
            prefix,
            q_norm=weights.norm(f"{prefix}.q_norm", config.head_dim, config.rms_norm_eps),
            k_norm=weights.norm(f"{prefix}.k_norm", config.head_dim, config.rms_norm_eps),
        )

    return pre_norm_lm(config, weights, attention)
