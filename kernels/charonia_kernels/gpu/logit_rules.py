"""Constraints on the next token: bias, excluded and allowed tokens, minimum length, bad words.

The layout is that of :mod:`charonia_kernels.logit_rule_layout`. Records of one entry run at the same time, which is
sound: exclusion adds -inf, which nothing finite takes back, and a bias is added atomically, so it never writes back a
logit from before an exclusion.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels import sampling_params as layout
from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits
from charonia_kernels.gpu.sampling import NUM_PARAMS, check_rows
from charonia_kernels.logit_rule_layout import RECORD_WORDS, RuleKind

NUM_PROMPT = tl.constexpr(layout.NUM_PROMPT)
MIN_TOKENS = tl.constexpr(layout.MIN_TOKENS)
WORDS = tl.constexpr(RECORD_WORDS)
BIAS = tl.constexpr(int(RuleKind.BIAS))
EXCLUDE = tl.constexpr(int(RuleKind.EXCLUDE))
STOP = tl.constexpr(int(RuleKind.STOP))
ALLOW = tl.constexpr(int(RuleKind.ALLOW))
BAD_WORDS = tl.constexpr(int(RuleKind.BAD_WORDS))


@dataclass(frozen=True, slots=True)
class RulesConfig:
    """splits: programs of a record. block: ids or tokens that one looks at in one go."""

    splits: int
    block: int
    num_warps: int
    use_pdl: bool


def rules_config(records: int, vocab: int, device: DeviceTraits) -> RulesConfig:
    """Launch parameters. Most records are short lists, but a mask covers the vocabulary."""
    block = 1024
    splits = min(triton.cdiv(vocab, block), max(1, 8 * device.num_sms // max(records, 1)), 32)
    return RulesConfig(splits, block, 4, device.has_pdl)


@triton.jit
def _exclude(row_logits, ids, mask):  # type: ignore[no-untyped-def]
    """NaN and +inf end as NaN: a row that has failed is not to look sound."""
    x = tl.load(row_logits + ids, mask=mask, other=0.0)
    tl.store(row_logits + ids, x + float("-inf"), mask=mask)


@triton.jit
def _listed(row_logits, words, kind, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < length
        ids = tl.load(words + index, mask=inside, other=0)
        if kind == BIAS:
            bits = tl.load(words + length + index, mask=inside, other=0)
            tl.atomic_add(row_logits + ids, bits.to(tl.float32, bitcast=True), mask=inside, sem="relaxed")
        else:
            _exclude(row_logits, ids, inside)


@triton.jit
def _masked(row_logits, words, length, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(tl.program_id(1) * BLOCK, vocab, tl.num_programs(1) * BLOCK):
        ids = start + tl.arange(0, BLOCK)
        bits = tl.load(words + ids // 32, mask=ids // 32 < length, other=0)
        _exclude(row_logits, ids, (ids < vocab) & (((bits >> (ids % 32)) & 1) == 0))


@triton.jit
def _bad_words(row_logits, words, length, row_tokens, num_tokens, num_output, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    longest = tl.load(words)
    for begin in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < length
        start = tl.load(words + 1 + 2 * index, mask=inside, other=0)
        prefix = tl.load(words + 2 + 2 * index, mask=inside, other=0)
        match = inside & (prefix <= num_output)
        for i in range(longest):
            compared = match & (i < prefix)
            wanted = tl.load(words + start + i, mask=compared, other=0)
            found = tl.load(row_tokens + num_tokens - prefix + i, mask=compared, other=0)
            match = match & (wanted == found)
        _exclude(row_logits, tl.load(words + start + prefix, mask=match, other=0), match)


@triton.jit(do_not_specialize_on_alignment=["rows", "seq_lens", "token_ids", "row_params", "records", "pool"])
def logit_rules_kernel(  # type: ignore[no-untyped-def]
    # pointers
    logits,
    rows,
    seq_lens,
    token_ids,
    row_params,
    records,
    pool,
    # scalars
    logits_stride,
    token_stride,
    vocab,
    # constants
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (record, split)."""
    gdc_launch_dependents(USE_PDL)
    gdc_wait(USE_PDL)
    record = records + tl.program_id(0) * WORDS
    entry = tl.load(record).to(tl.int64)
    kind = tl.load(record + 1)
    words = pool + tl.load(record + 2)
    length = tl.load(record + 3)
    row_logits = logits + entry * logits_stride
    if (kind == BIAS) | (kind == EXCLUDE):
        _listed(row_logits, words, kind, length, BLOCK)
    elif kind == ALLOW:
        _masked(row_logits, words, length, vocab, BLOCK)
    elif (kind == STOP) | (kind == BAD_WORDS):
        row = tl.load(rows + entry).to(tl.int64)
        num_tokens = tl.load(seq_lens + entry)
        num_output = num_tokens - tl.load(row_params + row * NUM_PARAMS + NUM_PROMPT)
        if kind == BAD_WORDS:
            row_tokens = token_ids + row * token_stride
            _bad_words(row_logits, words, length, row_tokens, num_tokens, num_output, BLOCK)
        elif num_output < tl.load(row_params + row * NUM_PARAMS + MIN_TOKENS):
            _listed(row_logits, words, kind, length, BLOCK)


def apply_logit_rules(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    token_ids: torch.Tensor,
    params: torch.Tensor,
    records: torch.Tensor,
    pool: torch.Tensor,
    *,
    config: RulesConfig | None = None,
) -> None:
    """Bias and exclude tokens; see :func:`charonia_kernels.reference.logit_rules.apply_logit_rules`.

    Args:
        logits: ``[B, V]`` fp32, in place.
        rows: ``[B]`` int32, the row of each entry.
        seq_lens: ``[B]`` int32, tokens that the row has.
        token_ids: ``[R, L]`` int32.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
        records: ``[M, 4]`` int32, as in :mod:`charonia_kernels.logit_rule_layout`; those of kind 0 are padding.
        pool: ``[P]`` int32, as there.
        config: launch parameters; by default :func:`rules_config`'s.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_rows("apply_logit_rules", logits, rows, params)
    if logits.dtype != torch.float32:
        raise ValueError(f"apply_logit_rules: logits must be fp32, got {logits.dtype}")
    if token_ids.dtype != torch.int32 or not token_ids.is_contiguous() or seq_lens.shape != rows.shape:
        raise ValueError("apply_logit_rules: token_ids must be contiguous int32, seq_lens one for each row")
    fits = records.dim() == 2 and records.shape[1] == RECORD_WORDS and records.is_contiguous()
    if not fits or records.dtype != torch.int32 or pool.dtype != torch.int32:
        raise ValueError(f"apply_logit_rules: records must be [M, {RECORD_WORDS}] int32, the pool int32")
    if len(records) == 0 or len(logits) == 0:
        return
    if config is None:
        config = rules_config(len(records), logits.shape[1], traits(logits.device))
    logit_rules_kernel[(len(records), config.splits)](
        logits, rows, seq_lens, token_ids, params, records, pool,
        logits.stride(0), token_ids.stride(0), logits.shape[1],
        BLOCK=config.block, USE_PDL=config.use_pdl, num_warps=config.num_warps, launch_pdl=config.use_pdl,
    )  # fmt: skip
