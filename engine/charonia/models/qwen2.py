"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v, and windows on upper layers."""

from charonia.model_config import ModelConfig
from charonia.models.decoder import Attention, CausalLM, pre_norm_lm
from charonia.models.layers import WeightBuilder


def qwen2(config: ModelConfig, weights: WeightBuilder) -> CausalLM:
    """`Qwen2ForCausalLM`. The biases and the windows are in the `ModelConfig`."""

    def attention(layer_idx: int, prefix: str) -> Attention:
        return Attention(config, layer_idx, weights, prefix)

    return pre_norm_lm(config, weights, attention)
