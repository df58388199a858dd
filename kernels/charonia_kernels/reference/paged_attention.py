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
    rows: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each query to the keys of its own sequence, up to and including its own position.

    Queries are aligned to the end of their sequence: query i of a sequence with n queries and L keys sits at position
    ``L - n + i``. Query head h reads key/value head ``h // (num_heads // num_kv_heads)``.

    Args:
        q: ``[T, num_heads, head_dim]``.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``.
        value_cache: as ``key_cache``.
        block_table: ``[num_rows, max_blocks]`` int32; block j of a row holds its keys ``j * block_size ...``.
        seq_lens: ``[B]`` int32, keys of each sequence, this step's included.
        query_start_loc: ``[B + 1]`` int32, the first query row of each sequence; the last entry is their total.
        scale: multiplies the scores.
        sliding_window: a query at position p sees keys at positions > p - sliding_window.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
        rows: ``[B]``, the row of the block table of each sequence. None: row b for sequence b.
        k_scale: one element: what stored keys are multiplied by. None: 1.
        v_scale: the same of values.

    Returns:
        ``[T, num_heads, head_dim]`` in q's dtype. Rows past ``query_start_loc[B]``, and rows that see no key, are zero.
    """
    dtype = compute_dtype(q)
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    out = torch.zeros_like(q)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    table_rows = range(len(lengths)) if rows is None else rows.tolist()
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        if first == last or length == 0:
            continue
        # Keys that no query sees are not read: behind the window, their blocks may belong to someone else by now.
        queries = last - first
        begin = 0 if sliding_window is None else max(0, length - queries - sliding_window + 1)
        skipped = begin // block_size
        blocks = block_table[table_rows[index], skipped : -(-length // block_size)].long()
        keys, values = (
            cache[blocks]
            .transpose(0, 1)
            .reshape(num_kv_heads, 1, -1, head_dim)[
                :, :, begin - skipped * block_size : length - skipped * block_size
            ]
            .to(dtype)
            * (1.0 if factor is None else factor.to(dtype))
            for cache, factor in ((key_cache, k_scale), (value_cache, v_scale))
        )
        grouped = q[first:last].to(dtype).view(queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = (grouped @ keys.transpose(-1, -2)) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        visible = _visible(queries, begin, length, sliding_window, q.device)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        # A row that sees no key has a softmax of NaN.
        weights = weights.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
        out[first:last] = (weights @ values).permute(2, 0, 1, 3).reshape(queries, -1, head_dim).to(q.dtype)
    return out


def _visible(queries: int, begin: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """``[queries, length - begin]`` bool: which of the keys from ``begin`` on each query sees."""
    position = torch.arange(length - queries, length, device=device)[:, None]
    key = torch.arange(begin, length, device=device)[None, :]
    visible = key <= position
    return visible if window is None else visible & (key > position - window)
