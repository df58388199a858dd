"""PyTorch oracles: one op a file, the same signature as the kernel it checks, any device.

Floating-point inputs narrower than fp64 are computed in fp32 and rounded once, at the end; fp64 inputs stay fp64,
which makes these functions their own high-precision oracle.
"""

from charonia_kernels.reference.activation import gelu_tanh_mul, silu_mul
from charonia_kernels.reference.embedding import embedding, gather_last_rows
from charonia_kernels.reference.linear import linear, linear_add, norm_linear, norm_linear_silu_mul
from charonia_kernels.reference.logprobs import Logprobs, logprobs
from charonia_kernels.reference.norm import add_rms_norm, rms_norm
from charonia_kernels.reference.paged_attention import paged_attention
from charonia_kernels.reference.rope import qk_norm_rope_write
from charonia_kernels.reference.rows import append_tokens, apply_writes, prepare_step

__all__ = [
    "Logprobs",
    "add_rms_norm",
    "append_tokens",
    "apply_writes",
    "embedding",
    "gather_last_rows",
    "gelu_tanh_mul",
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
