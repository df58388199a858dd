"""Charonia's compute kernels: one call an op, whatever the device.

CUDA tensors go to the Triton kernels of :mod:`charonia_kernels.gpu`, CPU tensors in fp32 or bf16 to the jitted kernels
of :mod:`charonia_kernels.cpu`, everything else to the PyTorch oracles of :mod:`charonia_kernels.reference`. Arguments,
shapes and results are those of the oracles.
"""

from typing import TYPE_CHECKING

import torch

from charonia_kernels import reference
from charonia_kernels._backend import cpu, gpu
from charonia_kernels.reference import Logprobs

if TYPE_CHECKING:
    from charonia_kernels.gpu import AttentionPlan

__all__ = [
    "Logprobs",
    "add_rms_norm",
    "allocate_plan",
    "append_tokens",
    "apply_writes",
    "build_plan",
    "cpu",
    "embedding",
    "gather_last_rows",
    "gelu_tanh_mul",
    "gpu",
    "linear",
    "linear_add",
    "logprobs",
    "norm_linear",
    "norm_linear_silu_mul",
    "paged_attention",
    "prepare_step",
    "qk_norm_rope_write",
    "rms_norm",
    "silu_mul",
]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension; see :func:`charonia_kernels.reference.rms_norm`."""
    if x.is_cuda:
        return gpu.rms_norm(x, weight, eps)
    if cpu.supports(x, weight):
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x`` in place, then RMSNorm; see :func:`charonia_kernels.reference.add_rms_norm`."""
    if x.is_cuda:
        return gpu.add_rms_norm(x, residual, weight, eps)
    if cpu.supports(x, residual, weight):
        return cpu.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; see :func:`charonia_kernels.reference.silu_mul`."""
    if x.is_cuda:
        return gpu.silu_mul(x)
    return cpu.silu_mul(x) if cpu.supports(x) else reference.silu_mul(x)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up``, tanh form; see :func:`charonia_kernels.reference.gelu_tanh_mul`."""
    if x.is_cuda:
        return gpu.gelu_tanh_mul(x)
    return cpu.gelu_tanh_mul(x) if cpu.supports(x) else reference.gelu_tanh_mul(x)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; see :func:`charonia_kernels.reference.linear`."""
    if x.is_cuda:
        return gpu.linear(x, weight, bias)
    if cpu.supports(x, weight):
        return cpu.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``residual += linear(x)`` in place; see :func:`charonia_kernels.reference.linear_add`."""
    if x.is_cuda:
        gpu.linear_add(x, weight, residual, bias)
    else:
        residual += linear(x, weight, bias)


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear(rms_norm(residual))``; see :func:`charonia_kernels.reference.norm_linear`."""
    if residual.is_cuda:
        return gpu.norm_linear(residual, norm_weight, eps, weight, bias)
    return linear(rms_norm(residual, norm_weight, eps), weight, bias)


def norm_linear_silu_mul(
    residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """``silu_mul(norm_linear(residual))``; see :func:`charonia_kernels.reference.norm_linear_silu_mul`."""
    if residual.is_cuda:
        return gpu.norm_linear_silu_mul(residual, norm_weight, eps, weight)
    return silu_mul(linear(rms_norm(residual, norm_weight, eps), weight))


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, max_count: int) -> Logprobs:
    """Log-probabilities and ranks; see :func:`charonia_kernels.reference.logprobs`."""
    implementation = gpu.logprobs if logits.is_cuda else reference.logprobs
    return implementation(logits, tokens, max_count)


def embedding(token_ids: torch.Tensor, weight: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Rows of a matrix by token id; see :func:`charonia_kernels.reference.embedding`."""
    implementation = gpu.embedding if weight.is_cuda else reference.embedding
    return implementation(token_ids, weight, scale)


def gather_last_rows(x: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
    """The last row of each entry; see :func:`charonia_kernels.reference.gather_last_rows`."""
    implementation = gpu.gather_last_rows if x.is_cuda else reference.gather_last_rows
    return implementation(x, query_start_loc)


def apply_writes(arena: torch.Tensor, staged: torch.Tensor, num_segments: int) -> None:
    """Scatter staged values into the arena; see :func:`charonia_kernels.reference.apply_writes`."""
    implementation = gpu.apply_writes if arena.is_cuda else reference.apply_writes
    implementation(arena, staged, num_segments)


def prepare_step(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Ids, positions, slots and lengths of a step; see :func:`charonia_kernels.reference.prepare_step`."""
    implementation = gpu.prepare_step if rows.is_cuda else reference.prepare_step
    implementation(
        rows,
        query_start_loc,
        num_computed,
        token_ids,
        block_table,
        block_size,
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
    )


def append_tokens(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    samples: torch.Tensor,
    tokens: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Feed a step's tokens to the next one; see :func:`charonia_kernels.reference.append_tokens`."""
    implementation = gpu.append_tokens if rows.is_cuda else reference.append_tokens
    implementation(rows, query_start_loc, seq_lens, samples, tokens, num_computed, token_ids)


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
    """Per-head norm, rotary embedding, KV write; see :func:`charonia_kernels.reference.qk_norm_rope_write`."""
    fixed = (
        qkv,
        positions,
        slot_mapping,
        cos_sin_cache,
        key_cache,
        value_cache,
        num_heads,
        num_kv_heads,
        head_dim,
        q_norm_weight,
        k_norm_weight,
        eps,
    )
    if qkv.is_cuda:
        return gpu.qk_norm_rope_write(*fixed, k_scale, v_scale)
    if cpu.supports(qkv, key_cache):
        return cpu.qk_norm_rope_write(*fixed)
    return reference.qk_norm_rope_write(*fixed, k_scale, v_scale)


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    plan: "AttentionPlan | None" = None,
) -> torch.Tensor:
    """Causal attention over paged KV; see :func:`charonia_kernels.reference.paged_attention`.

    With a plan, which the Triton kernels need, ``block_table`` is indexed by the rows that the plan was built from.
    """
    if plan is not None:
        return gpu.paged_attention(
            q, key_cache, value_cache, block_table, plan, scale, sliding_window, soft_cap, k_scale, v_scale
        )
    fixed = (
        q,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        scale,
        sliding_window,
        soft_cap,
    )
    if cpu.supports(q, key_cache) and q.shape[-1] % cpu.LANES == 0:
        return cpu.paged_attention(*fixed)
    return reference.paged_attention(*fixed, None, k_scale, v_scale)


def allocate_plan(
    max_batch: int,
    max_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
    *,
    has_cascade: bool = False,
) -> "AttentionPlan | None":
    """Buffers of attention's work lists, for devices whose kernels want them; None for others."""
    if device.type != "cuda":
        return None
    return gpu.AttentionPlan.allocate(
        max_batch, max_tokens, num_heads, num_kv_heads, head_dim, block_size, device, has_cascade=has_cascade
    )


def build_plan(
    plan: "AttentionPlan",
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    common_prefix_len: torch.Tensor | None = None,
) -> None:
    """Fill a step's work lists on the device; see :func:`charonia_kernels.gpu.build_plan`."""
    gpu.build_plan(plan, query_start_loc, seq_lens, rows, common_prefix_len)
