"""Attention of a step over the paged KV cache on the GPU: the launches that its plan asks for."""

import torch

from charonia_kernels.gpu._launch import traits
from charonia_kernels.gpu.attention_cascade import cascade_attention
from charonia_kernels.gpu.attention_decode import decode_attention
from charonia_kernels.gpu.attention_plan import AttentionPlan
from charonia_kernels.gpu.attention_prefill import HEAD_DIMS, prefill_attention


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch; see :func:`charonia_kernels.reference.paged_attention`.

    Args:
        q: ``[T, num_heads, head_dim]``, fp32, fp16 or bf16, dense but for its first dimension; T is at least the
            plan's query tokens.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, contiguous, of q's dtype or float8_e4m3fn.
        value_cache: as ``key_cache``.
        block_table: ``[num_rows, max_blocks]`` int32, rows contiguous; entry b uses row ``rows[b]`` of `build_plan`.
        plan: filled by `build_plan` earlier in this step, on the same stream.
        scale: positive; multiplies the scores.
        sliding_window: a query at position p sees keys at positions > p - sliding_window.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
        k_scale: one fp32: what stored keys are multiplied by. None: 1.
        v_scale: the same of values.
        out: ``[T, num_heads, head_dim]``, contiguous, of q's dtype; made if None.

    Returns:
        ``out``. Rows of tokens that belong to no entry are not written.

    Raises:
        ValueError: a shape, dtype or stride is not as described.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _check(q, key_cache, value_cache, block_table, plan, out, scale)
    if plan.batch == 0 or q.shape[0] == 0:
        return out
    options = (sliding_window, soft_cap)
    if plan.has_prefills:
        prefill_attention(
            q, key_cache, value_cache, block_table, plan.workspace.prefill_items[: plan.prefill_slots], out, scale,
            *options, k_scale, v_scale,
        )  # fmt: skip
    if plan.has_cascade:
        cascade_attention(q, key_cache, value_cache, block_table, plan, scale, *options, k_scale)
    if plan.has_decodes:
        decode_attention(q, key_cache, value_cache, block_table, plan, out, scale, *options, k_scale, v_scale)
    return out


def _check(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: AttentionPlan,
    out: torch.Tensor,
    scale: float,
) -> None:
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    planned = plan.num_heads, plan.num_kv_heads, plan.block_size, plan.head_dim
    if (q.shape[1], num_kv_heads, block_size, head_dim) != planned or q.shape[2] != head_dim:
        raise ValueError(
            f"paged_attention: q {list(q.shape)} and caches {list(key_cache.shape)} do not fit the plan, made for "
            f"(heads, KV heads, block size, head size) {planned}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"paged_attention: head_dim {head_dim} is not one of {HEAD_DIMS}")
    if q.shape[0] < plan.tokens:
        raise ValueError(f"paged_attention: q has {q.shape[0]} tokens, the plan {plan.tokens}")
    if value_cache.shape != key_cache.shape or not (
        key_cache.is_contiguous() and value_cache.is_contiguous()
    ):
        raise ValueError("paged_attention: key_cache and value_cache must be contiguous and of one shape")
    if key_cache.dtype not in (q.dtype, torch.float8_e4m3fn) or value_cache.dtype != key_cache.dtype:
        raise ValueError(
            f"paged_attention: a cache of {key_cache.dtype} does not go with queries of {q.dtype}"
        )
    if key_cache.dtype != q.dtype and traits(q.device).capability < (8, 9):
        raise ValueError("paged_attention: fp8 caches need compute capability 8.9")
    if q.stride(2) != 1 or q.stride(1) != head_dim or not out.is_contiguous() or out.shape != q.shape:
        raise ValueError(
            f"paged_attention: q and out must be dense but for q's tokens: strides {q.stride()}, {out.stride()}"
        )
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError("paged_attention: block_table must be int32 with contiguous rows")
    if not scale > 0:
        raise ValueError(f"paged_attention: scale must be positive: {scale}")
