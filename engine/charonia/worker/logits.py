"""Changes to the logits before sampling: constraints and penalties, each only for the rows that ask for it."""

import torch

from charonia.worker.batch import SampledRow
from charonia.worker.rows import RequestRows, RowState

NEG_INF = float("-inf")


def apply_constraints(
    logits: torch.Tensor, rows: RequestRows, sampled: list[SampledRow], states: list[RowState]
) -> bool:
    """Allowed tokens, bias, minimum length and bad words, in place; whether any token was excluded. [S, V] fp32."""
    excluded = False
    for i, (item, state) in enumerate(zip(sampled, states, strict=True)):
        sampling = state.sampling
        if sampling.allowed_token_ids is not None:
            banned = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            banned[sampling.allowed_token_ids] = False
            logits[i].masked_fill_(banned, NEG_INF)
            excluded = True
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[i, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        if state.stop_token_ids and item.position - state.num_prompt < sampling.min_tokens:
            logits[i, state.stop_token_ids] = NEG_INF
            excluded = True
        if state.bad_words:
            _ban_bad_words(logits[i], rows.token_ids[item.row], item.position, state)
            excluded = True
    return excluded


def _ban_bad_words(logits: torch.Tensor, tokens: torch.Tensor, position: int, state: RowState) -> None:
    """Ban each bad word's last token where its others were generated last; the prompt does not count.

    The comparison stays on the device: the latest token may not have reached the host yet.
    """
    num_output = position - state.num_prompt
    for word in state.bad_words:
        prefix, last = word[:-1], word[-1]
        if not prefix:
            logits[last] = NEG_INF
        elif len(prefix) <= num_output:
            tail = tokens[position - len(prefix) : position]
            matches = (tail == torch.tensor(prefix, dtype=tail.dtype, device=tail.device)).all()
            logits[last] = torch.where(matches, NEG_INF, logits[last])


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
            seen = torch.unique(tokens)
            scores = row[seen]
            factor = sampling.repetition_penalty
            row[seen] = torch.where(scores > 0, scores / factor, scores * factor)
        if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
            ids, counts = torch.unique(tokens[state.num_prompt :], return_counts=True)
            row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
