"""Repetition, frequency and presence penalties."""

import torch

from charonia_kernels import sampling_params as layout
from charonia_kernels.reference.sampling import float_column


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    token_ids: torch.Tensor,
    params: torch.Tensor,
) -> None:
    """Penalise tokens that a row has already, in place.

    Repetition (Keskar et al., 2019) divides positive logits and multiplies others, for tokens of prompt and output.
    Then tokens of the output lose ``frequency * count + presence``. Each distinct token once.

    Args:
        logits: ``[B, V]``, in place.
        rows: ``[B]`` int32, the row of each entry.
        seq_lens: ``[B]`` int32, tokens that the row has; those before the row's NUM_PROMPT are the prompt.
        token_ids: ``[R, L]`` int32.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
    """
    repetition = float_column(params, rows, layout.REPETITION).tolist()
    frequency = float_column(params, rows, layout.FREQUENCY).tolist()
    presence = float_column(params, rows, layout.PRESENCE).tolist()
    for entry in range(len(logits)):
        scores, row = logits[entry], int(rows[entry])
        tokens = token_ids[row, : int(seq_lens[entry])].long()
        if repetition[entry] != 1.0:
            old = scores[tokens]
            scores[tokens] = torch.where(old > 0, old / repetition[entry], old * repetition[entry])
        output = tokens[int(params[row, layout.NUM_PROMPT]) :]
        ids, counts = torch.unique(output, return_counts=True)
        scores[ids] -= frequency[entry] * counts.to(scores.dtype) + presence[entry] * (counts > 0)
