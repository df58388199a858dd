"""Rows picked by index: token embeddings, and each sequence's last hidden state."""

import torch

from charonia_kernels.reference._dtype import compute_dtype


def embedding(token_ids: torch.Tensor, weight: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """``weight[token_ids] * scale``.

    Args:
        token_ids: ``[T]`` int32 or int64, each in ``[0, V)``.
        weight: ``[V, H]``.
        scale: factor of the result, or None.

    Returns:
        ``[T, H]`` in weight's dtype.
    """
    rows = weight.index_select(0, token_ids)
    return rows if scale is None else (rows.to(compute_dtype(rows)) * scale).to(weight.dtype)


def gather_last_rows(x: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
    """Row ``query_start_loc[b + 1] - 1`` of x for every entry b: where its next token's logits come from.

    Args:
        x: ``[T, H]``, T > 0 unless B is 0.
        query_start_loc: ``[B + 1]`` int32, where each entry's rows begin. Indices are clamped to ``[0, T)``, so that a
            padding entry, which has no row, reads some row.

    Returns:
        ``[B, H]`` in x's dtype.
    """
    return x.index_select(0, (query_start_loc[1:] - 1).clamp(0, max(x.shape[0] - 1, 0)))
