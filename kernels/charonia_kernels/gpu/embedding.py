"""Rows picked by index on the GPU: token embeddings, and each sequence's last hidden state."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits


@dataclass(frozen=True, slots=True)
class RowCopyConfig:
    """block: lanes of a program, all of one row."""

    block: int
    num_warps: int
    use_pdl: bool


def row_copy_config(width: int, device: DeviceTraits) -> RowCopyConfig:
    """Launch parameters for rows of `width`: eight lanes a thread, 16 bytes of bf16."""
    block = min(1024, max(triton.next_power_of_2(width), 32))
    return RowCopyConfig(block, max(block // 256, 1), device.has_pdl)


@triton.jit
def embedding_kernel(  # type: ignore[no-untyped-def]
    # pointers
    token_ids,
    weight,
    out,
    # scalars; scale may be None
    weight_stride,
    scale,
    # constants
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of BLOCK lanes of a row; TILES tiles make a row. out [T, WIDTH] contiguous. The step's fence."""
    program = tl.program_id(0)
    token = (program // TILES).to(tl.int64)
    columns = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    # In this order: see "fence" in `_launch.py`.
    gdc_wait(USE_PDL)
    gdc_launch_dependents(USE_PDL)
    row = tl.load(token_ids + token).to(tl.int64)
    values = tl.load(weight + row * weight_stride + columns, mask=inside)
    if scale is not None:
        values = (values.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + columns, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gather_last_rows_kernel(  # type: ignore[no-untyped-def]
    # pointers
    x,
    query_start_loc,
    out,
    # scalars
    x_stride,
    num_rows,
    # constants
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of BLOCK lanes of an entry's row. out [B, WIDTH] contiguous."""
    gdc_launch_dependents(USE_PDL)
    program = tl.program_id(0)
    entry = program // TILES
    columns = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gdc_wait(USE_PDL)
    last = tl.load(query_start_loc + entry + 1) - 1
    row = tl.minimum(tl.maximum(last, 0), num_rows - 1).to(tl.int64)
    values = tl.load(x + row * x_stride + columns, mask=inside)
    tl.store(out + entry.to(tl.int64) * WIDTH + columns, values, mask=inside)


def embedding(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    scale: float | None = None,
    *,
    config: RowCopyConfig | None = None,
) -> torch.Tensor:
    """Rows of the embedding matrix; see :func:`charonia_kernels.reference.embedding.embedding`.

    On the device this is the fence of a step (`_launch.py`): kernels behind it may read early what lies before it.

    Args:
        token_ids: ``[T]`` int32 or int64, each in ``[0, V)``.
        weight: ``[V, H]``, rows may be strided.
        scale: factor of the result, or None.
        config: launch parameters; by default :func:`row_copy_config`'s.

    Returns:
        ``[T, H]`` in weight's dtype.

    Raises:
        ValueError: a rank or stride is not as described.
    """
    if token_ids.dim() != 1 or token_ids.stride(0) != 1 or weight.dim() != 2 or weight.stride(1) != 1:
        raise ValueError(
            f"embedding: token_ids {list(token_ids.shape)} must be [T] and weight {list(weight.shape)} [V, H], "
            "without gaps in the last dimension"
        )
    tokens, width = token_ids.shape[0], weight.shape[1]
    out = torch.empty((tokens, width), dtype=weight.dtype, device=weight.device)
    if tokens == 0:
        return out
    if config is None:
        config = row_copy_config(width, traits(weight.device))
    tiles = triton.cdiv(width, config.block)
    embedding_kernel[(tokens * tiles,)](
        token_ids,
        weight,
        out,
        weight.stride(0),
        scale,
        WIDTH=width,
        TILES=tiles,
        BLOCK=config.block,
        USE_PDL=config.use_pdl,
        num_warps=config.num_warps,
        launch_pdl=config.use_pdl,
    )
    return out


def gather_last_rows(
    x: torch.Tensor, query_start_loc: torch.Tensor, *, config: RowCopyConfig | None = None
) -> torch.Tensor:
    """Each entry's last row; see :func:`charonia_kernels.reference.embedding.gather_last_rows`.

    Args:
        x: ``[T, H]``, rows may be strided.
        query_start_loc: ``[B + 1]`` int32.
        config: launch parameters; by default :func:`row_copy_config`'s.

    Returns:
        ``[B, H]`` in x's dtype, row b being ``x[query_start_loc[b + 1] - 1]``, the index clamped to ``[0, T)``.

    Raises:
        ValueError: x has no rows to read, or a rank or stride is not as described.
    """
    if query_start_loc.dim() != 1 or query_start_loc.stride(0) != 1 or x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"gather_last_rows: query_start_loc {list(query_start_loc.shape)} must be [B + 1] and x {list(x.shape)} "
            "[T, H], without gaps in the last dimension"
        )
    rows, width = x.shape
    entries = query_start_loc.shape[0] - 1
    if entries > 0 and rows == 0:
        raise ValueError(f"gather_last_rows: x has no rows, query_start_loc has {entries} entries")
    out = torch.empty((entries, width), dtype=x.dtype, device=x.device)
    if entries == 0:
        return out
    if config is None:
        config = row_copy_config(width, traits(x.device))
    tiles = triton.cdiv(width, config.block)
    gather_last_rows_kernel[(entries * tiles,)](
        x,
        query_start_loc,
        out,
        x.stride(0),
        rows,
        WIDTH=width,
        TILES=tiles,
        BLOCK=config.block,
        USE_PDL=config.use_pdl,
        num_warps=config.num_warps,
        launch_pdl=config.use_pdl,
    )
    return out
