"""Causal attention of a ragged batch over a paged KV cache."""

import torch

from charonia_kernels.reference._dtype import compute_dtype


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attend each query to the keys of its own sequence, up to and including its own position.

    Queries are aligned to the end of their sequence: query i of a sequence with n queries and L keys sits at position
    ``L - n + i``. Query head h reads key/value head ``h // (num_heads // num_kv_heads)``.

    Args:
        q: ``[T, num_heads, head_dim]``.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``.
        value_cache: as ``key_cache``.
        block_table: ``[B, max_blocks]`` int32; block j of a sequence holds its keys ``j * block_size ...``.
        seq_lens: ``[B]`` int32, keys of each sequence, this step's included.
        query_start_loc: ``[B + 1]`` int32, the first query row of each sequence; the last entry is their total.
        scale: multiplies the scores.
        sliding_window: a query at position p sees keys at positions > p - sliding_window.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.

    Returns:
        ``[T, num_heads, head_dim]`` in q's dtype. Rows past ``query_start_loc[B]``, and rows that see no key, are zero.
    """
    dtype = compute_dtype(q)
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    out = torch.zeros_like(q)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last or length == 0:
            continue
        blocks = block_table[index, : -(-length // block_size)].long()
        keys, values = (
            cache[blocks].transpose(0, 1).reshape(num_kv_heads, 1, -1, head_dim)[:, :, :length].to(dtype)
            for cache in (key_cache, value_cache)
        )
        queries = q[first:last].to(dtype).view(last - first, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = (queries @ keys.transpose(-1, -2)) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores.masked_fill_(~_visible(last - first, length, sliding_window, q.device), float("-inf"))
        # A row whose sequence is shorter than its query count sees nothing: its softmax is NaN, its output zero.
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0) if length < last - first else scores.softmax(dim=-1)
        out[first:last] = (weights @ values).permute(2, 0, 1, 3).reshape(last - first, -1, head_dim).to(q.dtype)
    return out


def _visible(queries: int, length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """``[queries, length]`` bool: which key each query sees."""
    position = torch.arange(length - queries, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    visible = key <= position
    return visible if sliding_window is None else visible & (key > position - sliding_window)
