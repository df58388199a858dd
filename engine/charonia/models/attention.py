"""The seam between a model and what owns its KV cache: a model says what to attend, the context does it."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constants of one attention layer."""

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q·k."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it."""
    soft_cap: float | None = None
    """Scores become `soft_cap * tanh(scores / soft_cap)`."""


class AttentionContext(Protocol):
    """One step's batch: which tokens belong to which sequence, and where their keys and values live."""

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
        """Normalise q and k per head (if weights are given), rotate them, store k and v, attend.

        Args:
            spec: the layer.
            qkv: `[T, (num_heads + 2 * num_kv_heads) * head_dim]`.
            positions: `[T]` integers, rows of `cos_sin_cache`.
            cos_sin_cache: `[max_positions, head_dim]` fp32, cosines in the first half, sines in the second.
            q_norm_weight: `[head_dim]` or None.
            k_norm_weight: `[head_dim]` or None.
            eps: of both norms.

        Returns:
            `[T, num_heads * head_dim]` in qkv's dtype.
        """
        ...
