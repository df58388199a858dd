"""Llama (Touvron et al., 2023), and the models that are Llama under another name: Mistral, SmolLM2.

What sets them apart is data of the `ModelConfig`: rope scaling, sliding windows, biases, tied heads.
"""

from charonia.model_config import ModelConfig
from charonia.models.decoder import Attention, CausalLM, pre_norm_lm
from charonia.models.layers import WeightBuilder


def llama(config: ModelConfig, weights: WeightBuilder) -> CausalLM:
    """`LlamaForCausalLM` and `MistralForCausalLM`."""

    def attention(layer_idx: int, prefix: str) -> Attention:
        return Attention(config, layer_idx, weights, prefix)

    return pre_norm_lm(config, weights, attention)
