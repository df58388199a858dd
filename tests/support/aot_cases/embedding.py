"""Embedding and last rows at the widths of real models."""

from collections.abc import Iterator
from typing import Any

from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.embedding import embedding_kernel, gather_last_rows_kernel, row_copy_config
from support.aot import AotCase


def cases() -> Iterator[AotCase]:
    """Both kernels in bf16, the embedding with and without a scale."""
    for width in (576, 1024, 4096):
        config = row_copy_config(width, H100)
        constexprs: dict[str, Any] = {
            "WIDTH": width,
            "TILES": -(-width // config.block),
            "BLOCK": config.block,
        }
        lookup = {"token_ids": "*i32", "weight": "*bf16", "out": "*bf16", "weight_stride": "i32"}
        last = {"x": "*bf16", "query_start_loc": "*i32", "out": "*bf16", "x_stride": "i32", "num_rows": "i32"}
        variants = (
            ("embedding", embedding_kernel, lookup, {"scale": None}, ("weight_stride",)),
            ("embedding_scaled", embedding_kernel, {**lookup, "scale": "fp32"}, {}, ("weight_stride",)),
            ("gather_last_rows", gather_last_rows_kernel, last, {}, ("x_stride",)),
        )
        for name, kernel, signature, more, aligned in variants:
            for use_pdl, archs in ((False, (80,)), (True, (90, 100))):
                yield AotCase(
                    f"{name}_{width}",
                    kernel,
                    signature,
                    {**constexprs, **more, "USE_PDL": use_pdl},
                    config.num_warps,
                    aligned=aligned,
                    archs=archs,
                    options={"launch_pdl": use_pdl},
                )
