"""The row kernels: no pointer and no count is specialised on."""

from collections.abc import Iterator
from typing import Any

from charonia_kernels.gpu.rows import (
    STEP_BLOCK,
    WRITE_BLOCK,
    append_tokens_kernel,
    apply_writes_kernel,
    prepare_step_kernel,
)
from support.aot import AotCase


def cases() -> Iterator[AotCase]:
    """One case a kernel."""
    variants: tuple[tuple[Any, tuple[str, ...], dict[str, int]], ...] = (
        (apply_writes_kernel, (), {"BLOCK": WRITE_BLOCK}),
        (
            prepare_step_kernel,
            ("num_tokens", "num_entries", "search_steps", "token_stride", "block_stride", "max_tokens"),
            {"BLOCK": STEP_BLOCK, "BLOCK_SIZE": 64},
        ),
        (append_tokens_kernel, ("num_entries", "token_stride", "max_tokens"), {"BLOCK": STEP_BLOCK}),
    )
    for kernel, counts, constexprs in variants:
        constants = {*constexprs, "USE_PDL"}
        signature = {
            name: "i32" if name in counts else "*i32" for name in kernel.arg_names if name not in constants
        }
        for use_pdl, archs in ((False, (80,)), (True, (90, 100))):
            yield AotCase(
                kernel.fn.__name__,
                kernel,
                signature,
                {**constexprs, "USE_PDL": use_pdl},
                archs=archs,
                options={"launch_pdl": use_pdl},
            )
