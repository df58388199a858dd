"""CPU kernels, compiled by numba, on a thread pool of their own."""

import torch

from charonia_kernels.cpu._jit import ELEMENT
from charonia_kernels.cpu._simd import LANES
from charonia_kernels.cpu._threads import num_threads, set_num_threads
from charonia_kernels.cpu.activation import gelu_tanh_mul, silu_mul
from charonia_kernels.cpu.linear import has_native_bf16, linear
from charonia_kernels.cpu.norm import add_rms_norm, rms_norm
from charonia_kernels.cpu.paged_attention import paged_attention
from charonia_kernels.cpu.rope import qk_norm_rope_write
from charonia_kernels.cpu.warm_up import warm_up

__all__ = [
    "LANES",
    "add_rms_norm",
    "gelu_tanh_mul",
    "has_native_bf16",
    "linear",
    "num_threads",
    "paged_attention",
    "qk_norm_rope_write",
    "rms_norm",
    "set_num_threads",
    "silu_mul",
    "supports",
    "warm_up",
]


def supports(*tensors: torch.Tensor) -> bool:
    """Whether every tensor lies on the CPU in a dtype that the kernels read."""
    return all(tensor.is_cpu and tensor.dtype in ELEMENT for tensor in tensors)
