"""What top-k, top-p and min-p keep of each row, as one threshold: by search on the value, without a sort.

Two kernels. The first cuts the vocabulary into chunks and copies the largest values of each, at most `keep` of them and
hardly ever fewer than half of that, found by bisection on values that stay in registers. The second, one program a row,
looks for the threshold among all that was copied. A chunk also tells what its largest uncopied value can be; as long as
the threshold is above that in all chunks, nothing is missing and the result is exact. Where it is not (a flat
distribution whose nucleus has thousands of tokens) the program searches the row itself, which is in the L2 cache.

Chunks and the order of all sums are a function of the vocabulary alone, so a row's threshold does not depend on the
batch.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from charonia_kernels import sampling_params as layout
from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits
from charonia_kernels.gpu.sampling import (
    INVERSE_TEMPERATURE,
    NUM_PARAMS,
    TEMPERATURE,
    check_rows,
    from_ordered,
    ordered,
    row_float,
)

TOP_P = tl.constexpr(layout.TOP_P)
TOP_K = tl.constexpr(layout.TOP_K)
LOG_MIN_P = tl.constexpr(layout.LOG_MIN_P)
LOG2E = tl.constexpr(1.4426950408889634)
MAX_STEPS = tl.constexpr(96)
"""Twice what a search takes at most: every other step halves the fp32 numbers that are left."""

STAGES = tl.constexpr(4)
"""Blocks of a row on their way from the L2 cache while the whole row is searched."""

TOP = tl.constexpr(0)
LOW = tl.constexpr(1)
TOTAL = tl.constexpr(2)
FLOOR = tl.constexpr(3)
COUNT = tl.constexpr(4)
NUM_STATS = tl.constexpr(8)
"""Words that a chunk reports: largest and smallest finite value, sum of exp(value - TOP), what all uncopied values are
at most, and how many were copied."""


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """chunk: tokens of a chunk, a power of two. keep: values of it that are copied at most, a power of two.

    chunk_registers: most registers of a thread that holds a part of a chunk, so that several programs fit on a
    multiprocessor and one computes while another waits for its reductions.
    """

    chunk: int
    keep: int
    chunk_warps: int
    chunk_registers: int
    search_warps: int
    use_pdl: bool


@cache
def filter_config(vocab: int, device: DeviceTraits) -> FilterConfig:
    """Launch parameters, of the vocabulary alone."""
    chunk = 4096
    chunks = triton.next_power_of_2(triton.cdiv(vocab, chunk))
    keep = min(512, 8192 // chunks)
    return FilterConfig(chunk, keep, 8, 128, 8, device.has_pdl)


@triton.jit
def _filters(row_params, row, vocab):  # type: ignore[no-untyped-def]
    """(top_k or 0, top_p, log_min_p) of a row; 0, 1, -inf if it is greedy."""
    drawn = row_float(row_params, row, TEMPERATURE) > 0
    top_k = tl.load(row_params + row * NUM_PARAMS + TOP_K)
    top_k = tl.where(drawn & (top_k < vocab), top_k, 0)
    top_p = tl.where(drawn, row_float(row_params, row, TOP_P), 1.0)
    log_min_p = tl.where(drawn, row_float(row_params, row, LOG_MIN_P), float("-inf"))
    return top_k, top_p, log_min_p


@triton.jit
def _scaled(row_logits, ids, vocab, inverse):  # type: ignore[no-untyped-def]
    """Scaled logits, to the bit what `sample` compares with; NaN counts as excluded."""
    x = tl.load(row_logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32) * inverse
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _weights(scaled, top):  # type: ignore[no-untyped-def]
    return tl.exp2((scaled - top) * LOG2E)


@triton.jit
def _key_between(low, high, step):  # type: ignore[no-untyped-def]
    """A key from ordered(low) + 1 to ordered(high), as int64: in turn the middle of the values and of the keys.

    The first is quick on logits as they are, the second bounds the number of steps whatever they are.
    """
    first = ordered(low + 0.0).to(tl.int64) + 1
    last = ordered(high + 0.0).to(tl.int64)
    key = (first + last) >> 1
    if step % 2 == 0:
        key = tl.minimum(tl.maximum(ordered(0.5 * low + 0.5 * high).to(tl.int64), first), last)
    return key


@triton.jit
def _reaching(values, weights, low, high, target):  # type: ignore[no-untyped-def]
    """The largest of `values` v with sum(weights[values >= v]) >= target, or `low` if none above it has that.

    Both bounds move to values that exist, so the search ends as soon as one is left.
    """
    step = 0
    while (low < high) & (step < MAX_STEPS):
        middle = from_ordered(_key_between(low, high, step).to(tl.int32))
        above = values >= middle
        if tl.sum(tl.where(above, weights, 0.0), axis=0) >= target:
            low = tl.min(tl.where(above, values, float("inf")), axis=0)
        else:
            high = tl.max(tl.where(above, float("-inf"), values), axis=0)
        step += 1
    return low


@triton.jit
def _row_sum(row_logits, vocab, inverse, top, floor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the weights of a row's values from `floor` on."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        values = _scaled(row_logits, start + tl.arange(0, BLOCK), vocab, inverse)
        total += tl.where(values >= floor, _weights(values, top), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _row_reaching(  # type: ignore[no-untyped-def]
    row_logits, vocab, inverse, top, low, target, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    """`_reaching` over a whole row from `low` to `top`; weights are 1 if COUNTS, else those of the softmax."""
    floor = low
    high = top
    step = 0
    while (low < high) & (step < MAX_STEPS):
        middle = from_ordered(_key_between(low, high, step).to(tl.int32))
        total = tl.zeros((BLOCK,), tl.float32)
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            values = _scaled(row_logits, start + tl.arange(0, BLOCK), vocab, inverse)
            above = values >= middle
            if COUNTS:
                total += tl.where(above, 1.0, 0.0)
            else:
                total += tl.where(above, _weights(values, top), 0.0)
            least = tl.minimum(least, tl.where(above, values, float("inf")))
            most = tl.maximum(most, tl.where(above, float("-inf"), values))
        if tl.sum(total, axis=0) >= target:
            low = tl.min(least, axis=0)
        else:
            high = tl.maximum(tl.max(most, axis=0), floor)
        step += 1
    return low


@triton.jit
def _floor(values, top, low, count, KEEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A value that at most KEEP of `values` exceed, and at least half of that if no ties are in the way."""
    under = tl.full((), float("-inf"), tl.float32)  # exceeded by more than KEEP, unless all are few
    floor = tl.where(count > KEEP, top, under)
    exceeding = 0
    step = 0
    while (count > KEEP) & (exceeding < KEEP // 2) & (step < MAX_STEPS):
        middle = _key_between(tl.maximum(under, low), floor, step)
        # `floor` itself is known, and so is `under`.
        middle = tl.maximum(tl.minimum(middle, ordered(floor).to(tl.int64) - 1), ordered(under).to(tl.int64))
        if middle == ordered(under):
            step = MAX_STEPS
        else:
            value = from_ordered(middle.to(tl.int32))
            number = tl.sum((values > value).to(tl.int32), axis=0)
            if number > KEEP:
                under = value
            else:
                floor = value
                exceeding = number
            step += 1
    return floor


@triton.jit(do_not_specialize_on_alignment=["rows", "params"])
def filter_chunk_kernel(  # type: ignore[no-untyped-def]
    # pointers
    logits,
    rows,
    row_params,
    candidates,
    stats,
    # scalars
    stride,
    vocab,
    # constants
    CHUNK: tl.constexpr,
    KEEP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (chunk, entry). candidates: [B, chunks, KEEP] fp32. stats: [B, chunks, NUM_STATS] fp32."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    chunk, entry = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    top_k, top_p, log_min_p = _filters(row_params, row, vocab)
    if (top_k > 0) | (top_p < 1.0) | (log_min_p > float("-inf")):
        inverse = row_float(row_params, row, INVERSE_TEMPERATURE)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        values = _scaled(logits + entry.to(tl.int64) * stride, ids, vocab, inverse)
        finite = values > float("-inf")
        count = tl.sum(finite.to(tl.int32), axis=0)
        top = tl.max(values, axis=0)
        low = tl.min(tl.where(finite, values, top), axis=0)
        floor = _floor(values, top, low, count, KEEP)
        chosen = values > floor
        place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        slot = entry.to(tl.int64) * tl.num_programs(0) + chunk
        tl.store(candidates + slot * KEEP + place, values, mask=chosen)
        report = stats + slot * NUM_STATS
        tl.store(report + TOP, top)
        tl.store(report + LOW, low)
        if top_p < 1.0:
            tl.store(report + TOTAL, tl.sum(tl.where(finite, _weights(values, top), 0.0), axis=0))
        tl.store(report + FLOOR, floor)
        tl.store(report + COUNT, tl.sum(chosen.to(tl.int32), axis=0).to(tl.float32))


@triton.jit
def _search_row(  # type: ignore[no-untyped-def]
    row_logits, vocab, inverse, top, low, cut, top_k, top_p, BLOCK: tl.constexpr
):
    """The threshold of a row from all its logits, none copied."""
    threshold = cut
    if top_k > 0:
        kth = _row_reaching(row_logits, vocab, inverse, top, low, top_k.to(tl.float32), True, BLOCK)
        threshold = tl.maximum(kth, cut)
    if top_p < 1.0:
        mass = top_p * _row_sum(row_logits, vocab, inverse, top, threshold, BLOCK)
        first = tl.maximum(threshold, low)
        threshold = _row_reaching(row_logits, vocab, inverse, top, first, mass, False, BLOCK)
    return threshold


@triton.jit
def _search_candidates(values, top, floor, cut, total, top_k, top_p):  # type: ignore[no-untyped-def]
    """(threshold, whether that is certain), from all values of a row above `floor`; others are -inf."""
    everything = floor == float("-inf")
    chosen = values > float("-inf")
    low = tl.min(tl.where(chosen, values, top), axis=0)
    threshold = cut
    certain = tl.full((), 1, tl.int1)
    if top_k > 0:
        kth = _reaching(values, tl.where(chosen, 1.0, 0.0), low, top, top_k.to(tl.float32))
        threshold = tl.maximum(kth, cut)
        certain = everything | (tl.sum(chosen.to(tl.int32), axis=0) >= top_k)
    if top_p < 1.0:
        weights = tl.where(chosen & (values >= threshold), _weights(values, top), 0.0)
        present = tl.sum(weights, axis=0)
        if threshold > float("-inf"):
            certain = certain & (everything | (threshold > floor))
            total = present
        certain = certain & (everything | (present >= top_p * total))
        threshold = _reaching(values, weights, tl.maximum(low, threshold), top, top_p * total)
    return threshold, certain


@triton.jit(do_not_specialize_on_alignment=["rows", "params", "thresholds"])
def filter_search_kernel(  # type: ignore[no-untyped-def]
    # pointers
    logits,
    rows,
    row_params,
    candidates,
    stats,
    thresholds,
    # scalars
    stride,
    vocab,
    chunks,
    # constants
    CHUNKS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (entry). candidates and stats as in `filter_chunk_kernel`; CHUNKS: chunks up to a power of two."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    top_k, top_p, log_min_p = _filters(row_params, row, vocab)
    inverse = row_float(row_params, row, INVERSE_TEMPERATURE)
    threshold = tl.full((), float("-inf"), tl.float32)
    if (top_k > 0) | (top_p < 1.0) | (log_min_p > float("-inf")):
        base = entry.to(tl.int64) * chunks
        lanes = tl.arange(0, CHUNKS)
        report = stats + (base + lanes) * NUM_STATS
        used = lanes < chunks
        tops = tl.load(report + TOP, mask=used, other=float("-inf"))
        top = tl.max(tops, axis=0)
        low = tl.min(tl.load(report + LOW, mask=used & (tops > float("-inf")), other=float("inf")), axis=0)
        floor = tl.max(tl.load(report + FLOOR, mask=used, other=float("-inf")), axis=0)
        if top > float("-inf"):
            total = tl.full((), 0.0, tl.float32)
            if top_p < 1.0:
                totals = tl.load(report + TOTAL, mask=used, other=0.0)
                total = tl.sum(
                    tl.where(used & (tops > float("-inf")), totals * _weights(tops, top), 0.0), axis=0
                )
            index = tl.arange(0, CHUNKS * KEEP)
            chunk = index // KEEP
            copied = tl.load(stats + (base + chunk) * NUM_STATS + COUNT, mask=chunk < chunks, other=0.0)
            there = index % KEEP < copied.to(tl.int32)
            values = tl.load(candidates + base * KEEP + index, mask=there, other=float("-inf"))
            values = tl.where(values > floor, values, float("-inf"))
            cut = top + log_min_p
            threshold, certain = _search_candidates(values, top, floor, cut, total, top_k, top_p)
            if certain == 0:
                row_logits = logits + entry.to(tl.int64) * stride
                threshold = _search_row(row_logits, vocab, inverse, top, low, cut, top_k, top_p, BLOCK)
    tl.store(thresholds + entry, threshold)


def filter_thresholds(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    config: FilterConfig | None = None,
) -> torch.Tensor:
    """Where top_k, top_p and min_p cut each row; see :func:`charonia_kernels.reference.sampling.filter_thresholds`.

    A token is kept if its scaled logit, logit * (1 / temperature) in fp32, is at least the threshold.

    Args:
        logits: ``[B, V]`` fp32, bf16 or fp16, rows may be strided.
        rows: ``[B]`` int32, the row of each entry.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
        out: ``[B]`` fp32, where to write.
        config: launch parameters; by default :func:`filter_config`'s.

    Returns:
        ``[B]`` fp32; -inf for greedy rows and rows without a filter.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_rows("filter_thresholds", logits, rows, params)
    batch, vocab = logits.shape
    if out is None:
        out = torch.empty(batch, dtype=torch.float32, device=logits.device)
    if len(out) < batch or out.dtype != torch.float32:
        raise ValueError(f"filter_thresholds: out must be {batch} fp32, got {list(out.shape)} {out.dtype}")
    if batch == 0:
        return out
    if config is None:
        config = filter_config(vocab, traits(logits.device))
    chunks = triton.cdiv(vocab, config.chunk)
    space = torch.empty(
        batch * chunks * (config.keep + NUM_STATS.value), dtype=torch.float32, device=logits.device
    )
    candidates, stats = space[: batch * chunks * config.keep], space[batch * chunks * config.keep :]
    filter_chunk_kernel[(chunks, batch)](
        logits, rows, params, candidates, stats, logits.stride(0), vocab,
        CHUNK=config.chunk, KEEP=config.keep, USE_PDL=config.use_pdl,
        num_warps=config.chunk_warps, maxnreg=config.chunk_registers, launch_pdl=config.use_pdl,
    )  # fmt: skip
    filter_search_kernel[(batch,)](
        logits, rows, params, candidates, stats, out, logits.stride(0), vocab, chunks,
        CHUNKS=triton.next_power_of_2(chunks), KEEP=config.keep, BLOCK=512 * config.search_warps,
        USE_PDL=config.use_pdl, num_warps=config.search_warps, launch_pdl=config.use_pdl,
    )  # fmt: skip
    return out
