"""An `AttentionContext` over real paged caches, as small as can be: the worker's is the one that serves."""

from dataclasses import dataclass

import torch
from charonia.model_config import ModelConfig
from charonia.models import AttentionSpec, CausalLM
from charonia_kernels import paged_attention, qk_norm_rope_write

BLOCK_SIZE = 8


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    num_computed: int = 0


class PagedContext:
    """KV caches of all layers, with block 0 left to nobody, and the batch of the step that is running."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.caches = torch.full(shape, float("nan"), dtype=dtype)
        # Blocks come in an order that no kernel could get right by taking them for contiguous.
        generator = torch.Generator().manual_seed(num_blocks)
        self.free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()

    def attend(
        self,
        spec: AttentionSpec,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        q_norm_weight: torch.Tensor | None = None,
        k_norm_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor:
        keys, values = self.caches[spec.layer_idx]
        sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q = qk_norm_rope_write(
            qkv, positions, self.slots, cos_sin_cache, keys, values, *sizes, q_norm_weight, k_norm_weight, eps
        )
        window, cap = spec.sliding_window, spec.soft_cap
        out = paged_attention(
            q, keys, values, self.table, self.seq_lens, self.query_start_loc, spec.scale, window, cap
        )
        return out.reshape(len(out), -1)

    def step(self, model: CausalLM, batch: list[tuple[Sequence, int]]) -> torch.Tensor:
        """Advance each sequence by so many tokens; logits of all of them, one sequence after the other."""
        ids, positions, slots, lengths, starts = [], [], [], [], [0]
        for sequence, count in batch:
            first, last = sequence.num_computed, sequence.num_computed + count
            while len(sequence.blocks) * BLOCK_SIZE < last:
                sequence.blocks.append(self.free.pop())
            ids += sequence.tokens[first:last]
            positions += range(first, last)
            slots += [
                sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, last)
            ]
            lengths.append(last)
            starts.append(len(ids))
            sequence.num_computed = last
        width = max(len(sequence.blocks) for sequence, _ in batch)
        rows = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in batch]
        self.slots = torch.tensor(slots)
        self.table = torch.tensor(rows, dtype=torch.int32)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.query_start_loc = torch.tensor(starts, dtype=torch.int32)
        with torch.inference_mode():
            hidden = model(torch.tensor(ids), torch.tensor(positions), self)
            return model.compute_logits(hidden)


def greedy(
    model: CausalLM, config: ModelConfig, prompts: list[list[int]], new_tokens: int, chunk: int = 1 << 30
) -> list[list[int]]:
    """Greedy continuations of a ragged batch; prompts advance by `chunk` tokens a step beside decodes."""
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    context = PagedContext(
        config, 2 + len(prompts) * (longest // BLOCK_SIZE + 1), model.embed_tokens.weight.dtype
    )
    sequences = [Sequence(list(prompt), []) for prompt in prompts]
    goals = [len(prompt) + new_tokens for prompt in prompts]
    while True:
        live = [s for s, goal in zip(sequences, goals, strict=True) if len(s.tokens) < goal]
        if not live:
            return [s.tokens[len(prompt) :] for s, prompt in zip(sequences, prompts, strict=True)]
        batch = [(s, min(chunk, len(s.tokens) - s.num_computed)) for s in live]
        logits = context.step(model, batch)
        last = torch.tensor([count for _, count in batch]).cumsum(0) - 1
        for (sequence, _), token in zip(batch, logits[last].argmax(-1).tolist(), strict=True):
            if sequence.num_computed == len(sequence.tokens):
                sequence.tokens.append(token)
