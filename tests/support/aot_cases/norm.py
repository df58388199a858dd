"""RMSNorm at the widths of real models."""

from collections.abc import Iterator

from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.norm import norm_config, rms_norm_kernel
from support.aot import AotCase


def cases() -> Iterator[AotCase]:
    """With and without the residual; bf16, and once each fp16 and fp32."""
    for width, dtype, with_residual in (
        (576, "bf16", True),
        (1024, "bf16", False),
        (1024, "bf16", True),
        (4096, "bf16", False),
        (4096, "bf16", True),
        (5120, "bf16", True),
        (16384, "bf16", True),
        (4096, "fp16", True),
        (4096, "fp32", True),
    ):
        config = norm_config(width, H100)
        signature = {"x": f"*{dtype}", "residual": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{dtype}"}
        signature |= {"x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
        constexprs = {"WIDTH": width, "BLOCK": config.block}
        if not with_residual:
            del signature["residual"]
            constexprs["residual"] = None
        for use_pdl, archs in ((False, (80,)), (True, (90, 100))):
            yield AotCase(
                f"{'add_' if with_residual else ''}rms_norm_{dtype}_{width}",
                rms_norm_kernel,
                signature,
                {**constexprs, "USE_PDL": use_pdl},
                config.num_warps,
                aligned=("x_stride", "residual_stride"),
                archs=archs,
                options={"launch_pdl": use_pdl},
            )
