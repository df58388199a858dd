"""The KV cache, and attention over it: what a model's layers see as their explicit context."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from charonia_kernels import paged_attention, qk_norm_rope_write

from charonia.models.attention import AttentionSpec
from charonia.worker.batch import AttentionMetadata


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, in blocks; block 0 is the null block.

    keys, values: one tensor a layer, [num_blocks, num_kv_heads, block_size, head_dim].
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(
        cls, *, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> "KVCache":  # fmt: skip
        """Zeroed caches. On a CPU, the system gives each page when it is first written."""
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        values = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        return cls(keys, values)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy's comes from calloc.
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """One step's attention context: writes each layer's keys and values to the cache, and attends over it."""

    cache: KVCache
    metadata: AttentionMetadata

    def attend(
        self, spec: AttentionSpec, qkv: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor,
        q_norm_weight: torch.Tensor | None = None, k_norm_weight: torch.Tensor | None = None, eps: float = 1e-6,
    ) -> torch.Tensor:  # fmt: skip
        """Qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D]: optional QK-norm, RoPE, KV write, causal attention."""
        keys, values = self.cache.keys[spec.layer_idx], self.cache.values[spec.layer_idx]
        meta = self.metadata
        query = qk_norm_rope_write(
            qkv, positions, meta.slot_mapping, cos_sin_cache, keys, values, spec.num_heads, spec.num_kv_heads,
            spec.head_dim, q_norm_weight, k_norm_weight, eps,
        )  # fmt: skip
        out = paged_attention(
            query, keys, values, meta.block_table, meta.seq_lens, meta.query_start_loc, spec.scale,
            spec.sliding_window, spec.soft_cap,
        )  # fmt: skip
        return out.view(qkv.shape[0], spec.num_heads * spec.head_dim)
