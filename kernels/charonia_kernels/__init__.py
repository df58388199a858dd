"""Charonia's compute kernels: one call an op, whatever the device.

CPU tensors in fp32 or bf16 go to the jitted kernels of :mod:`charonia_kernels.cpu`; every other device and dtype goes
to the PyTorch oracles of :mod:`charonia_kernels.reference`. Arguments, shapes and results are those of the oracles.
"""

import torch

from charonia_kernels import cpu, reference

__all__ = [
    "add_rms_norm",
    "gelu_tanh_mul",
    "linear",
    "paged_attention",
    "qk_norm_rope_write",
    "rms_norm",
    "silu_mul",
]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension; see :func:`charonia_kernels.reference.rms_norm`."""
    if cpu.supports(x, weight):
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x`` in place, then RMSNorm; see :func:`charonia_kernels.reference.add_rms_norm`."""
    if cpu.supports(x, residual, weight):
        return cpu.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; see :func:`charonia_kernels.reference.silu_mul`."""
    return cpu.silu_mul(x) if cpu.supports(x) else reference.silu_mul(x)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up``, tanh form; see :func:`charonia_kernels.reference.gelu_tanh_mul`."""
    return cpu.gelu_tanh_mul(x) if cpu.supports(x) else reference.gelu_tanh_mul(x)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; see :func:`charonia_kernels.reference.linear`."""
    if cpu.supports(x, weight):
        return cpu.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


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
    """Per-head norm, rotary embedding, KV write; see :func:`charonia_kernels.reference.qk_norm_rope_write`."""
    implementation = cpu.qk_norm_rope_write if cpu.supports(qkv, key_cache) else reference.qk_norm_rope_write
    return implementation(
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
    """Causal attention over paged KV; see :func:`charonia_kernels.reference.paged_attention`."""
    use_cpu = cpu.supports(q, key_cache) and q.shape[-1] % cpu.LANES == 0
    implementation = cpu.paged_attention if use_cpu else reference.paged_attention
    return implementation(
        q, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale, sliding_window, soft_cap
    )
