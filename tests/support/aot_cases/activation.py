"""Gated activations at the widths of real models, for few rows and for many."""

from collections.abc import Iterator

from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.activation import activation_config, gated_kernel
from support.aot import AotCase


def cases() -> Iterator[AotCase]:
    """SiLU in bf16; GELU, fp16 and fp32 once each."""
    for rows, width, dtype, gelu in (
        (1, 1536, "bf16", False),
        (1, 3072, "bf16", False),
        (8192, 3072, "bf16", False),
        (1, 14336, "bf16", False),
        (8192, 14336, "bf16", False),
        (8192, 14336, "bf16", True),
        (8192, 14336, "fp16", False),
        (8192, 14336, "fp32", False),
    ):
        config = activation_config(rows, width, H100)
        for use_pdl, archs in ((False, (80,)), (True, (90, 100))):
            yield AotCase(
                f"{'gelu_tanh' if gelu else 'silu'}_mul_{dtype}_{width}_block{config.block}",
                gated_kernel,
                {"x": f"*{dtype}", "out": f"*{dtype}", "x_stride": "i32"},
                {
                    "WIDTH": width,
                    "TILES": -(-width // config.block),
                    "BLOCK": config.block,
                    "GELU": gelu,
                    "USE_PDL": use_pdl,
                },
                config.num_warps,
                aligned=("x_stride",),
                archs=archs,
                options={"launch_pdl": use_pdl},
            )
