"""Constraints on the next token: bias, excluded and allowed tokens, minimum length, bad words."""

import math

import torch

from charonia_kernels import sampling_params as layout
from charonia_kernels.logit_rule_layout import RuleKind


def apply_logit_rules(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    token_ids: torch.Tensor,
    params: torch.Tensor,
    records: torch.Tensor,
    pool: torch.Tensor,
) -> None:
    """Bias and exclude tokens, in place, as the records say.

    Args:
        logits: ``[B, V]``, in place.
        rows: ``[B]`` int32, the row of each entry.
        seq_lens: ``[B]`` int32, tokens that the row has; those before the row's NUM_PROMPT are the prompt.
        token_ids: ``[R, L]`` int32.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
        records: ``[M, 4]`` int32, as in :mod:`charonia_kernels.logit_rule_layout`; those of kind 0 are padding.
        pool: ``[P]`` int32, as there.
    """
    for entry, kind, offset, length in records.tolist():
        scores, row = logits[entry], int(rows[entry])
        words = pool[offset : offset + length].long()
        output = token_ids[row, int(params[row, layout.NUM_PROMPT]) : int(seq_lens[entry])].tolist()
        if kind == RuleKind.BIAS:
            scores[words] += pool[offset + length : offset + 2 * length].view(torch.float32).to(scores.dtype)
        elif kind == RuleKind.EXCLUDE or (
            kind == RuleKind.STOP and len(output) < int(params[row, layout.MIN_TOKENS])
        ):
            scores[words] += -math.inf
        elif kind == RuleKind.ALLOW:
            ids = torch.arange(min(32 * length, len(scores)), device=scores.device)
            allowed = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            allowed[ids] = (words[ids // 32] >> (ids % 32)) & 1 == 1
            scores[~allowed] += -math.inf
        elif kind == RuleKind.BAD_WORDS:
            scores[_banned(pool[offset:].tolist(), length, output)] += -math.inf


def _banned(words: list[int], number: int, output: list[int]) -> list[int]:
    """The last tokens of bad words whose other tokens end the output, each once."""
    banned = set()
    for start, prefix in zip(words[1 : 2 * number : 2], words[2 : 2 * number + 1 : 2], strict=True):
        if prefix <= len(output) and output[len(output) - prefix :] == words[start : start + prefix]:
            banned.add(words[start + prefix])
    return sorted(banned)
