"""Log-probabilities of chosen tokens, their ranks, and those of the likeliest tokens; no [N, V] softmax is written."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits
from charonia_kernels.reference.logprobs import Logprobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NUM_STATS = tl.constexpr(3)
"""Words that a chunk reports: largest logit, sum of exp(logit - largest), number of logits above the chosen token's."""


@dataclass(frozen=True, slots=True)
class LogprobsConfig:
    """chunk: logits of a program, a power of two."""

    chunk: int
    num_warps: int
    use_pdl: bool


def logprobs_config(device: DeviceTraits) -> LogprobsConfig:
    """Launch parameters, the same for all shapes: sums have one order, so a row does not depend on the batch."""
    return LogprobsConfig(4096, 4, device.has_pdl)


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def logprobs_chunk_kernel(  # type: ignore[no-untyped-def]
    # pointers
    logits,
    tokens,
    stats,
    # scalars
    stride,
    vocab,
    # constants
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (chunk, row). stats: [N, chunks, NUM_STATS] fp32."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_logits = logits + row * stride
    own = tl.load(row_logits + tl.load(tokens + row)).to(tl.float32)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    base = tl.where(top > float("-inf"), top, 0.0)
    report = stats + (row * tl.num_programs(0) + chunk) * NUM_STATS
    tl.store(report, top)
    tl.store(report + 1, tl.sum(tl.exp2((x - base) * LOG2E), axis=0))
    tl.store(report + 2, tl.sum((x > own).to(tl.int32), axis=0).to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=["tokens", "own", "rank", "normaliser"])
def logprobs_combine_kernel(  # type: ignore[no-untyped-def]
    # pointers
    logits,
    tokens,
    stats,
    own,
    rank,
    normaliser,
    # scalars
    stride,
    chunks,
    # constants
    CHUNKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (row). normaliser: [N] fp32, logarithm of the sum of exponentials; CHUNKS >= chunks, a power of two."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNKS)
    report = stats + (row * chunks + lanes) * NUM_STATS
    used = lanes < chunks
    tops = tl.load(report, mask=used, other=float("-inf"))
    sums = tl.load(report + 1, mask=used, other=0.0)
    above = tl.load(report + 2, mask=used, other=0.0)
    top = tl.max(tops, axis=0)
    base = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(sums * tl.exp2((tops - base) * LOG2E), axis=0)
    normal = base + tl.log2(total) * LN2
    x = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float32)
    tl.store(own + row, x - normal)
    tl.store(rank + row, 1 + tl.sum(above.to(tl.int32), axis=0))
    tl.store(normaliser + row, normal)


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, max_count: int, *, config: LogprobsConfig | None = None
) -> Logprobs:
    """Those of `tokens` and of the likeliest tokens; see :func:`charonia_kernels.reference.logprobs.logprobs`.

    Args:
        logits: ``[N, V]`` fp32, bf16 or fp16, unmodified; rows may be strided.
        tokens: ``[N]`` int32 or int64, in the vocabulary.
        max_count: how many of the most likely tokens to report; k is that, but V at most.
        config: launch parameters; by default :func:`logprobs_config`'s.

    Raises:
        ValueError: shapes do not fit.
    """
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.shape[1] == 0 or tokens.shape != logits.shape[:1]:
        shapes = list(logits.shape), list(tokens.shape)
        raise ValueError(
            f"logprobs: logits must be [N, V] without gaps in a row and tokens [N], got {shapes}"
        )
    count, vocab = logits.shape
    device = logits.device
    own = torch.empty(count, dtype=torch.float32, device=device)
    normaliser = torch.empty_like(own)
    rank = torch.empty(count, dtype=torch.int32, device=device)
    k = min(max_count, vocab)
    if count > 0:
        if config is None:
            config = logprobs_config(traits(device))
        chunks = triton.cdiv(vocab, config.chunk)
        stats = torch.empty(count * chunks * NUM_STATS.value, dtype=torch.float32, device=device)
        logprobs_chunk_kernel[(chunks, count)](
            logits, tokens, stats, logits.stride(0), vocab,
            CHUNK=config.chunk, USE_PDL=config.use_pdl, num_warps=config.num_warps, launch_pdl=config.use_pdl,
        )  # fmt: skip
        logprobs_combine_kernel[(count,)](
            logits, tokens, stats, own, rank, normaliser, logits.stride(0), chunks,
            CHUNKS=triton.next_power_of_2(chunks), USE_PDL=config.use_pdl, num_warps=1, launch_pdl=config.use_pdl,
        )  # fmt: skip
    if k == 0 or count == 0:
        none = torch.empty((count, k), dtype=torch.int32, device=device)
        return Logprobs(own, rank, none, none.float())
    top = logits.topk(k, dim=-1)
    return Logprobs(own, rank, top.indices.int(), top.values.float() - normaliser[:, None])
