"""Changes to the logits before sampling: constraints and penalties, each only for the rows that ask for it."""

from collections.abc import Mapping

import numpy as np
import torch

from charonia.worker.batch import SampledRow
from charonia.worker.logit_rules import NEG_INF
from charonia.worker.rows import RequestRows, RowState

ALL_ALLOWED: Mapping[int, torch.Tensor] = {}
"""No row follows a grammar."""


def apply_constraints(
    logits: torch.Tensor,
    rows: RequestRows,
    sampled: list[SampledRow],
    states: list[RowState],
    allowed: Mapping[int, torch.Tensor] = ALL_ALLOWED,
) -> bool:
    """Allowed tokens, bias, grammars, minimum length and bad words, in place; whether any token was excluded.

    logits: [S, V] fp32, on the CPU. allowed: [V] bool by row, of those that follow a grammar.
    """
    excluded = False
    for i, (item, state) in enumerate(zip(sampled, states, strict=True)):
        rules = state.rules
        if rules.additive is not None:
            logits[i] += rules.additive
            excluded = True
        mask = allowed.get(item.row)
        if mask is not None:
            # NumPy's masked copy is several times faster than PyTorch's, where masks are mostly of one value.
            np.copyto(logits[i].numpy(), NEG_INF, where=~mask.numpy())
            excluded = True
        if state.stop_token_ids and item.position - state.num_prompt < state.sampling.min_tokens:
            logits[i, state.stop_token_ids] = NEG_INF
            excluded = True
        if rules.bad_words is not None:
            rules.bad_words.ban(logits[i], rows.token_ids[item.row, state.num_prompt : item.position])
            excluded = True
    return excluded


def apply_penalties(
    logits: torch.Tensor, rows: RequestRows, sampled: list[SampledRow], states: list[RowState]
) -> None:
    """Repetition, frequency and presence penalties, in place. logits: [S, V] fp32.

    Repetition (Keskar et al., 2019) counts prompt and output, the others count the output alone. Counts are taken from
    the rows' tokens each time, so they need no state and survive preemption.
    """
    for i, (item, state) in enumerate(zip(sampled, states, strict=True)):
        sampling = state.sampling
        row = logits[i]
        tokens = rows.token_ids[item.row, : item.position].long()
        if sampling.repetition_penalty != 1.0:
            factor = sampling.repetition_penalty
            scores = row[tokens]
            row[tokens] = torch.where(scores > 0, scores / factor, scores * factor)
        if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
            ids, counts = torch.unique(tokens[state.num_prompt :], return_counts=True)
            row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
