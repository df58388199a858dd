"""The KV cache, and attention over it: what a model's layers see as their explicit context."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from charonia_kernels import paged_attention, qk_norm_rope_write

from charonia.models.attention import AttentionSpec
from charonia.worker.batch import InputBatch


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, in blocks; block 0 is the null block.

    keys, values: one tensor a layer, [num_blocks, num_kv_heads, block_size, head_dim]. scale: one fp32 element that
    multiplies what a cache of 8-bit floats holds; None for wider dtypes.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scale: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls, *, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> "KVCache":  # fmt: skip
        """Zeroed caches. On a CPU, the system gives each page when it is first written."""
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        values = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        scale = torch.ones(1, device=device) if dtype.itemsize == 1 else None
        return cls(keys, values, scale)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy's comes from calloc.
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """One step's attention context: writes each layer's keys and values to the cache, and attends over it.

    block_table: [N, max_blocks] int32. With a plan (`charonia_kernels.gpu.AttentionPlan`, the work lists of kernels
    that want them) it is indexed by row, without one by entry of the batch.
    """

    cache: KVCache
    batch: InputBatch
    block_table: torch.Tensor
    plan: Any = None

    def attend(
        self, spec: AttentionSpec, qkv: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor,
        q_norm_weight: torch.Tensor | None = None, k_norm_weight: torch.Tensor | None = None, eps: float = 1e-6,
    ) -> torch.Tensor:  # fmt: skip
        """Qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D]: optional QK-norm, RoPE, KV write, causal attention."""
        cache, batch = self.cache, self.batch
        keys, values, scale = cache.keys[spec.layer_idx], cache.values[spec.layer_idx], cache.scale
        query = qk_norm_rope_write(
            qkv, positions, batch.slot_mapping, cos_sin_cache, keys, values, spec.num_heads, spec.num_kv_heads,
            spec.head_dim, q_norm_weight, k_norm_weight, eps, scale, scale,
        )  # fmt: skip
        out = paged_attention(
            query, keys, values, self.block_table, batch.seq_lens, batch.query_start_loc, spec.scale,
            spec.sliding_window, spec.soft_cap, scale, scale, self.plan,
        )  # fmt: skip
        return out.view(qkv.shape[0], spec.num_heads * spec.head_dim)
