"""Per-head norm, rotary embedding and KV cache write on the CPU, in one pass over the fused QKV projection."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray

from charonia_kernels.cpu._jit import FLOAT, INT, SOURCE_DIGEST, WORK, Kernel, check_caches, jit, workers_for
from charonia_kernels.cpu._simd import claim_item, load, pointer, store

_TOKENS_PER_ITEM = 4
_F32 = numba.float32
_I64 = numba.int64


class _Args(ctypes.Structure):
    _fields_ = [
        *WORK,
        *(
            (name, INT)
            for name in ("qkv", "positions", "slots", "cos_sin", "keys", "values", "q_weight", "k_weight")
        ),
        *((name, INT) for name in ("out", "tokens", "heads", "kv_heads", "head_dim", "rot", "qkv_stride")),
        *((name, INT) for name in ("block_size", "block_stride", "q_norm", "k_norm")),
        ("eps", FLOAT),
    ]


@jit
def _norm_rotate(x, weight, has_norm, cos, sin, out, head_dim, half, eps):  # type: ignore[no-untyped-def]
    inverse = np.float32(1.0)
    if has_norm:
        total = np.float32(0.0)
        for i in range(head_dim):
            value = load(x, i)
            total += value * value
        inverse = np.float32(1.0 / np.sqrt(np.float64(total) / head_dim + eps))
    for i in range(half):
        low = load(x, i) * inverse * weight[i]
        high = load(x, i + half) * inverse * weight[i + half]
        store(out, i, low * cos[i] - high * sin[i])
        store(out, i + half, high * cos[i] + low * sin[i])
    for i in range(2 * half, head_dim):
        store(out, i, load(x, i) * inverse * weight[i])


@jit
def _copy(x, out, width):  # type: ignore[no-untyped-def]
    for i in range(width):
        store(out, i, load(x, i))


def _build(x_type: Any, cache_type: Any) -> Callable[[Any], None]:
    digest = SOURCE_DIGEST
    x_bytes, cache_bytes = x_type.bitwidth // 8, cache_type.bitwidth // 8

    def entry(args):  # type: ignore[no-untyped-def]
        if digest == "":
            return
        a = carray(args, 1)[0]
        dim, half = a.head_dim, a.rot // 2
        positions = pointer(a.positions, _I64)
        slots = pointer(a.slots, _I64)
        q_weight, k_weight = pointer(a.q_weight, _F32), pointer(a.k_weight, _F32)
        while True:
            item = claim_item(args)
            if item >= a.num_items:
                break
            for token in range(item * _TOKENS_PER_ITEM, min(a.tokens, (item + 1) * _TOKENS_PER_ITEM)):
                cos = pointer(a.cos_sin + positions[token] * a.rot * 4, _F32)
                sin = pointer(a.cos_sin + (positions[token] * a.rot + half) * 4, _F32)
                row = a.qkv + token * a.qkv_stride * x_bytes
                for head in range(a.heads):
                    x = pointer(row + head * dim * x_bytes, x_type)
                    out = pointer(a.out + (token * a.heads + head) * dim * x_bytes, x_type)
                    _norm_rotate(x, q_weight, a.q_norm, cos, sin, out, dim, half, a.eps)
                block, place = slots[token] // a.block_size, slots[token] % a.block_size
                for head in range(a.kv_heads):
                    target = (block * a.block_stride + (head * a.block_size + place) * dim) * cache_bytes
                    key = pointer(row + (a.heads + head) * dim * x_bytes, x_type)
                    out_key = pointer(a.keys + target, cache_type)
                    _norm_rotate(key, k_weight, a.k_norm, cos, sin, out_key, dim, half, a.eps)
                    value = pointer(row + (a.heads + a.kv_heads + head) * dim * x_bytes, x_type)
                    _copy(value, pointer(a.values + target, cache_type), dim)

    return entry


KERNEL = Kernel(_Args, _build)


@lru_cache(maxsize=16)
def _ones(width: int) -> torch.Tensor:
    return torch.ones(width)


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
) -> torch.Tensor:
    """Normalise, rotate, store k and v, return q; see :func:`charonia_kernels.reference.qk_norm_rope_write`.

    Args:
        qkv: ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``, fp32 or bf16, last dimension contiguous.
        positions: ``[T]`` int64, contiguous.
        slot_mapping: ``[T]`` int64, contiguous.
        cos_sin_cache: ``[P, rot]`` fp32, contiguous.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, fp32 or bf16, blocks contiguous.
        value_cache: as ``key_cache``, with the same strides.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: D.
        q_norm_weight: ``[head_dim]`` or None.
        k_norm_weight: ``[head_dim]`` or None.
        eps: of both norms.

    Returns:
        q, ``[T, num_heads, head_dim]`` in qkv's dtype.

    Raises:
        ValueError: a shape, dtype or stride is not as described.
    """
    tokens = qkv.shape[0]
    lanes = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.shape[1] != lanes or qkv.stride(1) != 1 or key_cache.shape[1] != num_kv_heads:
        raise ValueError(
            f"qk_norm_rope_write: qkv {list(qkv.shape)}, strides {qkv.stride()}, and caches of {key_cache.shape[1]} "
            f"heads do not fit {num_heads} query and {num_kv_heads} KV heads of {head_dim}"
        )
    if not (
        positions.dtype == slot_mapping.dtype == torch.int64
        and positions.shape[0] == slot_mapping.shape[0] == tokens
        and positions.is_contiguous()
        and slot_mapping.is_contiguous()
    ):
        raise ValueError(
            f"qk_norm_rope_write: positions {list(positions.shape)} {positions.dtype} and slot_mapping "
            f"{list(slot_mapping.shape)} {slot_mapping.dtype} must be [{tokens}] int64, contiguous"
        )
    check_caches("qk_norm_rope_write", key_cache, value_cache, head_dim)
    cos_sin_cache = cos_sin_cache.to(torch.float32).contiguous()
    out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype)
    q_weight = _ones(head_dim) if q_norm_weight is None else q_norm_weight.to(torch.float32)
    k_weight = _ones(head_dim) if k_norm_weight is None else k_norm_weight.to(torch.float32)
    items = -(-tokens // _TOKENS_PER_ITEM)
    args = _Args(
        0,
        0,
        items,
        qkv.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        cos_sin_cache.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        q_weight.data_ptr(),
        k_weight.data_ptr(),
        out.data_ptr(),
        tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        cos_sin_cache.shape[1],
        qkv.stride(0),
        key_cache.shape[2],
        key_cache.stride(0),
        q_norm_weight is not None,
        k_norm_weight is not None,
        eps,
    )
    work = 2 * tokens * lanes
    KERNEL.launch((qkv.dtype, key_cache.dtype), args, workers_for(work, items))
    return out
