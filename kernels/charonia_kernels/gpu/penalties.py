"""Repetition, frequency and presence penalties, counted anew from the rows' tokens at each step."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels import sampling_params as layout
from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits
from charonia_kernels.gpu.sampling import NUM_PARAMS, check_rows, row_float

REPETITION = tl.constexpr(layout.REPETITION)
FREQUENCY = tl.constexpr(layout.FREQUENCY)
PRESENCE = tl.constexpr(layout.PRESENCE)
NUM_PROMPT = tl.constexpr(layout.NUM_PROMPT)
IN_PROMPT = tl.constexpr(1 << 30)
"""Set in a token's count if the prompt has it."""


@dataclass(frozen=True, slots=True)
class PenaltyConfig:
    """programs: each takes every programs-th entry. block: tokens that one looks at in one go."""

    programs: int
    block: int
    num_warps: int
    use_pdl: bool


def penalty_config(batch: int, tables: int, device: DeviceTraits) -> PenaltyConfig:
    """Launch parameters: a program an entry as far as there are tables."""
    return PenaltyConfig(min(batch, tables), 2048, 16, device.has_pdl)


def allocate_counts(max_batch: int, vocab: int, device: torch.device) -> torch.Tensor:
    """Tables for `apply_penalties`, ``[W, V]`` int32, W at most 64 (33 MB at 128k tokens)."""
    return torch.zeros((max(1, min(max_batch, 64)), vocab), dtype=torch.int32, device=device)


@triton.jit
def _token_block(row_tokens, start, end, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = start + tl.arange(0, BLOCK)
    ids = tl.load(row_tokens + places, mask=places < end, other=-1)
    return ids, (ids >= 0) & (ids < vocab)


@triton.jit
def _penalise(  # type: ignore[no-untyped-def]
    row_logits,
    table,
    row_tokens,
    first,
    num_prompt,
    length,
    vocab,
    repetition,
    frequency,
    presence,
    BLOCK: tl.constexpr,
):
    """Penalise each distinct token of row_tokens[first:length] once; leaves the table all zeros again."""
    for start in range(first, num_prompt, BLOCK):
        ids, valid = _token_block(row_tokens, start, num_prompt, vocab, BLOCK)
        tl.atomic_or(table + ids, IN_PROMPT, mask=valid, sem="relaxed")
    for start in range(num_prompt, length, BLOCK):
        ids, valid = _token_block(row_tokens, start, length, vocab, BLOCK)
        tl.atomic_add(table + ids, 1, mask=valid, sem="relaxed")
    tl.debug_barrier()
    for start in range(first, length, BLOCK):
        ids, valid = _token_block(row_tokens, start, length, vocab, BLOCK)
        found = tl.atomic_xchg(table + ids, 0, mask=valid, sem="relaxed")
        # Of all places of a token exactly one takes its count.
        mine = valid & (found != 0)
        x = tl.load(row_logits + ids, mask=mine, other=0.0)
        x = tl.where(x > 0, x / repetition, x * repetition)
        count = found & (IN_PROMPT - 1)
        x -= tl.where(count > 0, frequency * count.to(tl.float32) + presence, 0.0)
        tl.store(row_logits + ids, x, mask=mine)
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=["batch"],
    do_not_specialize_on_alignment=["rows", "seq_lens", "token_ids", "row_params", "counts"],
)
def penalties_kernel(  # type: ignore[no-untyped-def]
    # pointers
    logits,
    rows,
    seq_lens,
    token_ids,
    row_params,
    counts,
    # scalars
    logits_stride,
    token_stride,
    counts_stride,
    vocab,
    batch,
    # constants
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program p: entries p, p + programs, ..., one after the other, with table p."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    program = tl.program_id(0)
    table = counts + program.to(tl.int64) * counts_stride
    for entry in range(program, batch, tl.num_programs(0)):
        row = tl.load(rows + entry).to(tl.int64)
        repetition = row_float(row_params, row, REPETITION)
        frequency = row_float(row_params, row, FREQUENCY)
        presence = row_float(row_params, row, PRESENCE)
        if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
            length = tl.minimum(tl.load(seq_lens + entry), token_stride)
            num_prompt = tl.minimum(tl.load(row_params + row * NUM_PARAMS + NUM_PROMPT), length)
            first = tl.where(repetition != 1.0, 0, num_prompt)
            row_logits = logits + tl.cast(entry, tl.int64) * logits_stride
            row_tokens = token_ids + row * token_stride
            _penalise(
                row_logits, table, row_tokens, first, num_prompt, length, vocab,
                repetition, frequency, presence, BLOCK,
            )  # fmt: skip


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    token_ids: torch.Tensor,
    params: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    config: PenaltyConfig | None = None,
) -> None:
    """Penalise tokens that a row has already; see :func:`charonia_kernels.reference.penalties.apply_penalties`.

    The work of an entry grows with its length, not with the vocabulary.

    Args:
        logits: ``[B, V]`` fp32, in place.
        rows: ``[B]`` int32, the row of each entry.
        seq_lens: ``[B]`` int32, tokens that the row has; those before the row's NUM_PROMPT are the prompt.
        token_ids: ``[R, L]`` int32.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
        counts: ``[W, V]`` int32, all zeros before and after, as from :func:`allocate_counts`. W entries are worked on
            at a time. Without it, the call allocates and fills its own.
        config: launch parameters; by default :func:`penalty_config`'s.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_rows("apply_penalties", logits, rows, params)
    batch, vocab = logits.shape
    if logits.dtype != torch.float32:
        raise ValueError(f"apply_penalties: logits must be fp32, got {logits.dtype}")
    if token_ids.dtype != torch.int32 or not token_ids.is_contiguous() or seq_lens.shape != rows.shape:
        raise ValueError("apply_penalties: token_ids must be contiguous int32, seq_lens one for each row")
    if batch == 0:
        return
    if counts is None:
        counts = allocate_counts(batch, vocab, logits.device)
    if counts.shape[1] < vocab or counts.dtype != torch.int32 or counts.stride(1) != 1:
        raise ValueError(f"apply_penalties: counts must be [W, {vocab}] int32, got {list(counts.shape)}")
    if config is None:
        config = penalty_config(batch, len(counts), traits(logits.device))
    penalties_kernel[(config.programs,)](
        logits, rows, seq_lens, token_ids, params, counts,
        logits.stride(0), token_ids.stride(0), counts.stride(0), vocab, batch,
        BLOCK=config.block, USE_PDL=config.use_pdl, num_warps=config.num_warps, launch_pdl=config.use_pdl,
    )  # fmt: skip
