"""Triton kernels: one op a file, the same signatures as the oracles of :mod:`charonia_kernels.reference`.

Ops that exist on GPUs alone: work lists for attention (`AttentionPlan`, `build_plan`), which turn a step's lengths into
equal shares for the multiprocessors.
"""

from charonia_kernels.gpu.activation import gelu_tanh_mul, silu_mul
from charonia_kernels.gpu.attention_plan import AttentionPlan, build_plan
from charonia_kernels.gpu.compile_ahead import compile_only
from charonia_kernels.gpu.embedding import embedding, gather_last_rows
from charonia_kernels.gpu.linear import linear, linear_add, norm_linear, norm_linear_silu_mul
from charonia_kernels.gpu.logit_rules import apply_logit_rules
from charonia_kernels.gpu.logprobs import logprobs
from charonia_kernels.gpu.norm import add_rms_norm, rms_norm
from charonia_kernels.gpu.paged_attention import paged_attention
from charonia_kernels.gpu.penalties import allocate_counts, apply_penalties
from charonia_kernels.gpu.rope import qk_norm_rope_write
from charonia_kernels.gpu.rows import append_tokens, apply_writes, prepare_step
from charonia_kernels.gpu.sampling import SampledTokens, SampleScratch, sample
from charonia_kernels.gpu.sampling_filters import filter_thresholds

__all__ = [
    "AttentionPlan",
    "SampleScratch",
    "SampledTokens",
    "add_rms_norm",
    "allocate_counts",
    "append_tokens",
    "apply_logit_rules",
    "apply_penalties",
    "apply_writes",
    "build_plan",
    "compile_only",
    "embedding",
    "filter_thresholds",
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
    "sample",
    "silu_mul",
]
