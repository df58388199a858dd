"""One token a row in one pass over the logits: the largest one, or a drawn one by the Gumbel-max trick.

``argmax(logits / temperature + gumbel)`` is a draw from the softmax (Gumbel, 1954; Maddison et al., 2014), so neither a
sum nor a sort is needed. The noise of a token is a function of (seed, position, token id) by Philox4x32 with 7 rounds
(Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), so a row's token depends on nothing else: not on
the batch, and not on how the vocabulary is split over programs.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from charonia_kernels import sampling_params as layout
from charonia_kernels.draw_outcome import DrawOutcome
from charonia_kernels.gpu._launch import INTERPRETED, DeviceTraits, gdc_launch_dependents, gdc_wait, traits

TEMPERATURE = tl.constexpr(layout.TEMPERATURE)
INVERSE_TEMPERATURE = tl.constexpr(layout.INVERSE_TEMPERATURE)
SEED_LO = tl.constexpr(layout.SEED_LO)
SEED_HI = tl.constexpr(layout.SEED_HI)
NUM_PARAMS = tl.constexpr(layout.NUM_PARAMS)
DRAWN = tl.constexpr(int(DrawOutcome.DRAWN))
NOT_FINITE = tl.constexpr(int(DrawOutcome.NOT_FINITE))
EXCLUDED = tl.constexpr(int(DrawOutcome.EXCLUDED))

GROUP = tl.constexpr(512)
"""Counters of a tile. One Philox block serves the four tokens that lie this far apart; part of what a seed means."""
TILE = tl.constexpr(2048)
"""Tokens that a program looks at in one go: four for each counter."""
ROUNDS = tl.constexpr(7)
NOTHING_YET = tl.constexpr(-(2**63 - 1))
"""Less than any packed (score, token)."""
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETER = tl.constexpr(INTERPRETED)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """tokens: ``[B]`` int32. outcomes: ``[B]`` int32, of :class:`DrawOutcome`; but for `DRAWN`, the token is any."""

    tokens: torch.Tensor
    outcomes: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampleScratch:
    """What the programs of a row meet in; each launch leaves it as it found it.

    best: ``[>= B]`` int64, `NOTHING_YET`. arrived: ``[>= B]`` int32, zeros.
    """

    best: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(cls, max_batch: int, device: torch.device) -> "SampleScratch":
        """Scratch for batches of up to `max_batch` entries, of one stream."""
        best = torch.full((max_batch,), NOTHING_YET.value, dtype=torch.int64, device=device)
        return cls(best, torch.zeros(max_batch, dtype=torch.int32, device=device))


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """splits: programs of a row. tiles: how many `TILE`s of the vocabulary each of them takes."""

    splits: int
    tiles: int
    num_warps: int
    use_pdl: bool


@cache
def sample_config(batch: int, vocab: int, device: DeviceTraits, programs_per_sm: int = 8) -> SampleConfig:
    """Launch parameters: as many programs as fit the device at once, each with as few tiles as that allows."""
    tiles = triton.cdiv(vocab, TILE.value)
    share = triton.cdiv(max(batch, 1) * tiles, device.num_sms * programs_per_sm)
    share = min(share, tiles)
    return SampleConfig(triton.cdiv(tiles, share), share, 4, device.has_pdl)


@triton.jit
def row_float(row_params, row, COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]
    """An fp32 parameter of a row."""
    return tl.load(row_params + row * NUM_PARAMS + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """fp32 -> int32 with the same order. Its own inverse, up to the types: see `from_ordered`."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(key):  # type: ignore[no-untyped-def]
    """int32 -> fp32, the inverse of `ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _log(x):  # type: ignore[no-untyped-def]
    """Natural logarithm by the hardware's approximation: its absolute error is 2e-7 near 1."""
    if INTERPRETER:  # noqa: SIM108
        result = tl.log2(x)
    else:
        result = libdevice.fast_log2f(x)
    return result * LN2


@triton.jit
def _gumbel(bits):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise from 32 random bits.

    -log(-log(1 - v)) with v in (0, 1). The large values come from small v, which has its full precision there; the
    series (relative error 1e-6) keeps that precision where 1 - v would lose it.
    """
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = v * (1.0 + v * (0.5 + v * 0.3333333333333333))
    exponential = tl.where(v < 0.015625, series, -_log(1.0 - v))
    return -_log(exponential)


@triton.jit
def _perturbed(x, inverse, bits, cut):  # type: ignore[no-untyped-def]
    scaled = x * inverse
    return tl.where(scaled >= cut, scaled + _gumbel(bits), float("-inf"))


@triton.jit
def _logits(row_logits, ids, vocab):  # type: ignore[no-untyped-def]
    return tl.load(row_logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _take(score, ids, best, token):  # type: ignore[no-untyped-def]
    """Ids only grow, so of equals the lowest stays."""
    better = score > best
    return tl.where(better, score, best), tl.where(better, ids, token)


@triton.jit
def _best_of(row_logits, first, end, vocab, inverse, position, key_lo, key_hi, cut, drawn):  # type: ignore[no-untyped-def]
    """Per counter lane: the best score, its token, and whether any logit was NaN or +inf. Tokens first..end."""
    lane = tl.arange(0, GROUP)
    best = tl.full((GROUP,), float("-inf"), tl.float32)
    token = tl.zeros((GROUP,), tl.int32)
    bad = tl.zeros((GROUP,), tl.int1)
    for start in range(first, end, TILE):
        ids = start + lane
        x0 = _logits(row_logits, ids, vocab)
        x1 = _logits(row_logits, ids + GROUP, vocab)
        x2 = _logits(row_logits, ids + 2 * GROUP, vocab)
        x3 = _logits(row_logits, ids + 3 * GROUP, vocab)
        finite = (x0 < float("inf")) & (x1 < float("inf")) & (x2 < float("inf")) & (x3 < float("inf"))
        bad = bad | (finite == 0)
        noisy = drawn
        if drawn & (cut > float("-inf")):
            # Nearly all tiles of a filtered row have no token to draw.
            largest = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=0)
            noisy = largest * inverse >= cut
        if noisy:
            counter = (start // 4 + lane).to(tl.uint32)
            zero = tl.zeros((GROUP,), tl.uint32)
            r0, r1, r2, r3 = tl.philox_impl(counter, zero + position, zero, zero, key_lo, key_hi, ROUNDS)
            x0 = _perturbed(x0, inverse, r0, cut)
            x1 = _perturbed(x1, inverse, r1, cut)
            x2 = _perturbed(x2, inverse, r2, cut)
            x3 = _perturbed(x3, inverse, r3, cut)
        if noisy | (drawn == 0):
            best, token = _take(x0, ids, best, token)
            best, token = _take(x1, ids + GROUP, best, token)
            best, token = _take(x2, ids + 2 * GROUP, best, token)
            best, token = _take(x3, ids + 3 * GROUP, best, token)
    return best, token, bad


SCALARS = ("rows", "seq_lens", "row_params", "thresholds", "best", "arrived", "tokens", "outcomes")
"""Read and written one word at a time: views with any offset may come, and one compilation has to serve them all."""


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def sample_kernel(  # type: ignore[no-untyped-def]
    # pointers; thresholds may be None
    logits,
    rows,
    seq_lens,
    row_params,
    thresholds,
    best,
    arrived,
    tokens,
    outcomes,
    # scalars
    stride,
    vocab,
    tiles,
    # constants
    USE_PDL: tl.constexpr,
):
    """Program (split, entry). The last program of an entry to arrive writes the result and resets the scratch."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    entry = tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    drawn = row_float(row_params, row, TEMPERATURE) > 0
    inverse = row_float(row_params, row, INVERSE_TEMPERATURE)
    key_lo = tl.load(row_params + row * NUM_PARAMS + SEED_LO).to(tl.uint32, bitcast=True)
    key_hi = tl.load(row_params + row * NUM_PARAMS + SEED_HI).to(tl.uint32, bitcast=True)
    position = tl.load(seq_lens + entry).to(tl.uint32, bitcast=True)
    cut = tl.full((), float("-inf"), tl.float32)
    if thresholds is not None:
        cut = tl.load(thresholds + entry)
    first = tl.program_id(0) * tiles * TILE
    end = tl.minimum(first + tiles * TILE, vocab)
    row_logits = logits + entry.to(tl.int64) * stride
    score, token, bad = _best_of(row_logits, first, end, vocab, inverse, position, key_lo, key_hi, cut, drawn)

    top = tl.max(score, axis=0) + 0.0  # no -0: it would order below 0
    winner = tl.min(tl.where(score == top, token, 0x7FFFFFFF), axis=0)
    packed = (ordered(top).to(tl.int64) << 32) | (0x7FFFFFFF - winner).to(tl.int64)
    tl.atomic_max(best + entry, packed, sem="relaxed")
    report = 1 + (tl.max(bad.to(tl.int32), axis=0) << 16)
    reports = tl.atomic_add(arrived + entry, report, sem="acq_rel") + report
    if (reports & 0xFFFF) == tl.num_programs(0):
        packed = tl.atomic_xchg(best + entry, NOTHING_YET, sem="relaxed")
        tl.atomic_xchg(arrived + entry, 0, sem="relaxed")
        found = from_ordered((packed >> 32).to(tl.int32)) > float("-inf")
        outcome = tl.where(reports >= 0x10000, NOT_FINITE, tl.where(found, DRAWN, EXCLUDED))
        tl.store(tokens + entry, 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32))
        tl.store(outcomes + entry, outcome)


def check_rows(op: str, logits: torch.Tensor, rows: torch.Tensor, params: torch.Tensor) -> None:
    """Raise `ValueError` unless logits ``[B, V]``, rows ``[B]`` and params ``[R, NUM_PARAMS]`` fit each other."""
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must be [B, V] without gaps in a row, got {list(logits.shape)}")
    if rows.shape != logits.shape[:1] or rows.dtype != torch.int32 or not rows.is_contiguous():
        raise ValueError(f"{op}: rows must be {len(logits)} int32, got {list(rows.shape)} {rows.dtype}")
    wanted = (NUM_PARAMS.value, torch.int32)
    if params.dim() != 2 or (params.shape[1], params.dtype) != wanted or not params.is_contiguous():
        raise ValueError(
            f"{op}: params must be [R, {wanted[0]}] int32, got {list(params.shape)} {params.dtype}"
        )


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    *,
    out: SampledTokens | None = None,
    scratch: SampleScratch | None = None,
    config: SampleConfig | None = None,
) -> SampledTokens:
    """Draw a token for each entry; see :func:`charonia_kernels.reference.sampling.sample`.

    Args:
        logits: ``[B, V]`` fp32, bf16 or fp16, rows may be strided. Loads are wide if V and the stride are multiples
            of 16.
        rows: ``[B]`` int32, the row of each entry. Those of padding entries are valid too, and so is what they get.
        seq_lens: ``[B]`` int32, the new token's position.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
        thresholds: ``[B]`` fp32; tokens whose scaled logit is smaller are left out, but not in greedy rows.
        out: where to write.
        scratch: without it, the call allocates and fills its own.
        config: launch parameters; by default :func:`sample_config`'s. The result does not depend on them.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_rows("sample", logits, rows, params)
    batch, vocab = logits.shape
    if seq_lens.shape != rows.shape or (thresholds is not None and thresholds.shape != rows.shape):
        raise ValueError(f"sample: seq_lens and thresholds must have {batch} elements")
    if out is None:
        tokens, outcomes = (torch.empty(batch, dtype=torch.int32, device=logits.device) for _ in range(2))
        out = SampledTokens(tokens, outcomes)
    if len(out.tokens) < batch or len(out.outcomes) < batch:
        raise ValueError(f"sample: out has room for fewer than {batch} entries")
    if batch == 0:
        return out
    if scratch is None:
        scratch = SampleScratch.allocate(batch, logits.device)
    if len(scratch.best) < batch:
        raise ValueError(f"sample: scratch for {len(scratch.best)} entries, batch of {batch}")
    if config is None:
        config = sample_config(batch, vocab, traits(logits.device))
    sample_kernel[(config.splits, batch)](
        logits,
        rows,
        seq_lens,
        params,
        thresholds,
        scratch.best,
        scratch.arrived,
        out.tokens,
        out.outcomes,
        logits.stride(0),
        vocab,
        config.tiles,
        USE_PDL=config.use_pdl,
        num_warps=config.num_warps,
        launch_pdl=config.use_pdl,
    )
    return out
