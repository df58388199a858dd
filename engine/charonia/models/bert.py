"""BERT (Devlin et al., 2019): an encoder, whose tokens see the whole of their prompt, before and behind them.

    x = LayerNorm(word + position + token type)
    each layer:  x = LayerNorm(x + attention(x));  x = LayerNorm(x + dense(gelu(dense(x))))

There is no KV cache: a prompt is computed as a whole, in one step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from charonia.errors import ModelLoadError
from charonia.model_config import EncoderConfig, ModelConfig
from charonia.models.layers import Embedding, LayerNorm, WeightBuilder


class BertLayer:
    """Attention and MLP, each followed by the sum with its input and a norm."""

    def __init__(
        self, config: ModelConfig, encoder: EncoderConfig, weights: WeightBuilder, prefix: str
    ) -> None:
        """Allocate the layer's tensors, whose names begin with `prefix`."""
        hidden, inner, eps = config.hidden_size, config.intermediate_size, encoder.layer_norm_eps
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        self.qkv_proj = weights.linear(
            f"{prefix}.attention.self", hidden, {"query": hidden, "key": hidden, "value": hidden}, bias=True
        )
        self.o_proj = weights.linear(f"{prefix}.attention.output", hidden, {"dense": hidden}, bias=True)
        self.attention_norm = weights.layer_norm(f"{prefix}.attention.output.LayerNorm", hidden, eps)
        self.up_proj = weights.linear(f"{prefix}.intermediate", hidden, {"dense": inner}, bias=True)
        self.down_proj = weights.linear(f"{prefix}.output", inner, {"dense": hidden}, bias=True)
        self.mlp_norm = weights.layer_norm(f"{prefix}.output.LayerNorm", hidden, eps)

    def __call__(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """`[T, H]` to `[T, H]`; `lengths` of the prompts, which follow one another, sum to T."""
        heads = self._attend(self.qkv_proj(x), lengths)
        x = self.attention_norm(x + self.o_proj(heads))
        return self.mlp_norm(x + self.down_proj(F.gelu(self.up_proj(x))))

    def _attend(self, qkv: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """`[T, 3 H]` to `[T, H]`, prompt by prompt: nothing is padded, and no prompt sees another."""
        parts = []
        for part in torch.split(qkv, list(lengths)):
            query, key, value = part.view(len(part), 3, -1, self.head_dim).permute(1, 2, 0, 3).unsqueeze(1)
            seen = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
            parts.append(seen[0].transpose(0, 1).reshape(len(part), -1))
        return torch.cat(parts)


class BertEncoder:
    """Token ids in, hidden states out. It keeps no state between calls."""

    def __init__(
        self, words: Embedding, positions: Embedding, token_type: torch.Tensor, norm: LayerNorm,
        layers: Sequence[BertLayer],
    ) -> None:  # fmt: skip
        """token_type: `[H]`, of the first of two sentences: a prompt is always one."""
        self.words = words
        self.positions = positions
        self.token_type = token_type
        self.norm = norm
        self.layers = tuple(layers)

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Run the stack.

        Args:
            input_ids: `[T]` integers, the tokens of all prompts, one after the other.
            positions: `[T]` integers, of each token in its prompt.
            lengths: of the prompts, at least 1 each; they sum to T.

        Returns:
            `[T, H]` hidden states of the last layer, in the model's dtype.
        """
        x = self.norm(self.words(input_ids) + self.positions(positions) + self.token_type)
        for layer in self.layers:
            x = layer(x, lengths)
        return x


def bert(config: ModelConfig, weights: WeightBuilder) -> BertEncoder:
    """`BertModel`. The pooler, a dense layer over the first token for classifiers, is left out."""
    encoder = config.encoder
    if encoder is None:
        raise ModelLoadError(f"{config.architecture} is not an encoder")
    hidden, first = config.hidden_size, "embeddings"
    weights.pass_over(f"{first}.position_ids", "pooler.dense.weight", "pooler.dense.bias")
    types = weights.embedding(f"{first}.token_type_embeddings", encoder.type_vocab_size, hidden)
    return BertEncoder(
        words=weights.embedding(f"{first}.word_embeddings", config.vocab_size, hidden),
        positions=weights.embedding(f"{first}.position_embeddings", encoder.num_positions, hidden),
        token_type=types.weight[0],
        norm=weights.layer_norm(f"{first}.LayerNorm", hidden, encoder.layer_norm_eps),
        layers=[
            BertLayer(config, encoder, weights, f"encoder.layer.{index}")
            for index in range(config.num_layers)
        ],
    )
