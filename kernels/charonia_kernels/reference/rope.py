"""What lies between the QKV projection and attention: per-head norm, rotary embedding (Su et al., 2021), KV write."""

import torch

from charonia_kernels.reference._dtype import compute_dtype
from charonia_kernels.reference.norm import rms_norm

FP8_MAX = 448.0
"""The largest finite number of fp8 e4m3."""


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first ``rot`` lanes of ``x [T, heads, D]`` by ``cos_sin [T, rot]``; lane i pairs with i + rot / 2."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def _encode(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``x / scale`` in the cache's dtype; fp8 saturates at its largest number."""
    if scale is not None:
        x = x / scale.to(x.dtype)
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-FP8_MAX, FP8_MAX)
    return x.to(dtype)


def qk_norm_rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise q and k per head (if weights are given), rotate them, store k and v, return q.

    Args:
        qkv: ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``, not modified.
        positions: ``[T]`` int64 or int32, rows of ``cos_sin_cache``.
        slot_mapping: ``[T]`` int64 or int32, each >= 0; token t goes to block ``slot // block_size``, offset
            ``slot % block_size``. Padding tokens carry slots of block 0, the null block.
        cos_sin_cache: ``[P, rot]`` fp32, ``rot <= head_dim`` even; cosines in the first half, sines in the second.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, written in place.
        value_cache: as ``key_cache``.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: D.
        q_norm_weight: ``[head_dim]`` or None.
        k_norm_weight: ``[head_dim]`` or None.
        eps: of both norms.
        k_scale: one fp32 element, or None for 1: what is stored is ``k / k_scale``, as fp8 caches need it.
        v_scale: as ``k_scale``, for v.

    Returns:
        q, ``[T, num_heads, head_dim]`` in qkv's dtype.
    """
    tokens = qkv.shape[0]
    dtype = compute_dtype(qkv)
    heads = qkv.to(dtype).view(tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps)
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, eps)
    cos_sin = cos_sin_cache[positions].to(dtype)
    block_size = key_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    key_cache[block, :, offset] = _encode(_rotate(k, cos_sin), k_scale, key_cache.dtype)
    value_cache[block, :, offset] = _encode(v, v_scale, value_cache.dtype)
    return _rotate(q, cos_sin).to(qkv.dtype)
