"""Sampling by the Gumbel-max trick with counter-based noise, and the thresholds of top-k, top-p and min-p."""

import math

import torch

from charonia_kernels import sampling_params as layout
from charonia_kernels.draw_outcome import DrawOutcome

GROUP = 512
"""Tokens t, t + GROUP, t + 2 GROUP and t + 3 GROUP of each 4 GROUP take the four words of one Philox block."""
ROUNDS = 7
_MASK = 0xFFFFFFFF


def float_column(params: torch.Tensor, rows: torch.Tensor, column: int) -> torch.Tensor:
    """An fp32 parameter of each entry: params ``[R, NUM_PARAMS]`` int32, rows ``[B]`` -> ``[B]``."""
    return params[rows.long(), column].contiguous().view(torch.float32)


def philox(counters: torch.Tensor, position: int, seed_lo: int, seed_hi: int) -> torch.Tensor:
    """Philox4x32 (Salmon et al., 2011) with `ROUNDS` rounds of (counter, position, 0, 0) under the key of a seed.

    counters: ``[N]`` int64 -> ``[N, 4]`` int64 of 32 bits.
    """
    c0, c1 = counters & _MASK, torch.full_like(counters, position & _MASK)
    c2, c3 = torch.zeros_like(counters), torch.zeros_like(counters)
    k0, k1 = seed_lo & _MASK, seed_hi & _MASK
    for _ in range(ROUNDS):
        # Products wrap around at 64 bits; of their upper halves the sign is masked off.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & _MASK ^ c1 ^ k0, b & _MASK, (a >> 32) & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel(vocab: int, position: int, seed_lo: int, seed_hi: int, device: torch.device) -> torch.Tensor:
    """The noise of all tokens, ``[V]`` fp64."""
    tiles = -(-vocab // (4 * GROUP))
    words = philox(torch.arange(tiles * GROUP, device=device), position, seed_lo, seed_hi)
    bits = words.view(tiles, GROUP, 4).transpose(1, 2).reshape(-1)[:vocab]
    # As many bits as fp32 keeps.
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    return -torch.log(-torch.log1p(-v))


def scores(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `sample` takes the largest of: ``[B, V]`` fp64. Logits of greedy rows are as they were."""
    result = logits.double()
    inverse = float_column(params, rows, layout.INVERSE_TEMPERATURE)
    drawn = float_column(params, rows, layout.TEMPERATURE) > 0
    for entry in range(len(logits)):
        if not bool(drawn[entry]):
            continue
        words = params[int(rows[entry])].tolist()
        scaled = logits[entry].float() * inverse[entry]
        noise = gumbel(
            logits.shape[1], int(seq_lens[entry]), words[layout.SEED_LO], words[layout.SEED_HI], logits.device
        )
        result[entry] = scaled.double() + noise
        if thresholds is not None:
            result[entry] = torch.where(scaled >= thresholds[entry], result[entry], -math.inf)
    return result


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each entry: the largest logit of greedy rows, the largest of the perturbed ones of others.

    Args:
        logits: ``[B, V]``, any floating-point dtype.
        rows: ``[B]`` int32, the row of each entry.
        seq_lens: ``[B]`` int32, the new token's position.
        params: ``[R, 16]`` int32, as in :mod:`charonia_kernels.sampling_params`.
        thresholds: ``[B]``; tokens whose scaled logit is smaller are left out, but not in greedy rows.

    Returns:
        tokens ``[B]`` int32 and outcomes ``[B]`` int32, of :class:`DrawOutcome`.
    """
    perturbed = scores(logits, rows, seq_lens, params, thresholds)
    outcomes = torch.where(perturbed.amax(dim=-1) == -math.inf, DrawOutcome.EXCLUDED, DrawOutcome.DRAWN)
    outcomes[~(logits < math.inf).all(dim=-1)] = DrawOutcome.NOT_FINITE
    tokens = perturbed.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argmax(dim=-1)
    return tokens.int(), outcomes.int()


def filter_thresholds(logits: torch.Tensor, rows: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The scaled logit (logit times 1 / temperature, in fp32) from which on top_k, top_p and min_p keep tokens.

    top_p applies to what top_k and min_p left, renormalised; the most likely token stays, and so do ties at each cut.

    Args:
        logits: ``[B, V]``.
        rows: ``[B]`` int32.
        params: ``[R, 16]`` int32.

    Returns:
        ``[B]`` fp32; -inf for greedy rows and rows without a filter.
    """
    result = torch.full((len(logits),), -math.inf, device=logits.device)
    inverse = float_column(params, rows, layout.INVERSE_TEMPERATURE)
    drawn = (float_column(params, rows, layout.TEMPERATURE) > 0).tolist()
    top_p = float_column(params, rows, layout.TOP_P).tolist()
    log_min_p = float_column(params, rows, layout.LOG_MIN_P)
    top_k = params[rows.long(), layout.TOP_K].tolist()
    for entry in range(len(logits)):
        if drawn[entry]:
            scaled = logits[entry].float() * inverse[entry]
            result[entry] = _threshold(scaled, top_k[entry], top_p[entry], log_min_p[entry])
    return result


def _threshold(scaled: torch.Tensor, top_k: int, top_p: float, log_min_p: torch.Tensor) -> torch.Tensor:
    """Of one row: ``[V]`` fp32 -> scalar."""
    threshold = scaled.amax() + log_min_p
    if 0 < top_k < len(scaled):
        finite = max(int((scaled > -math.inf).sum()), 1)
        threshold = torch.maximum(threshold, scaled.topk(min(top_k, finite)).values[-1])
    if top_p >= 1.0 or not bool(threshold.isfinite() | (scaled.amax() > -math.inf)):
        return threshold
    kept = scaled[(scaled >= threshold) & (scaled > -math.inf)].sort(descending=True).values
    weights = (kept.double() - kept[0]).exp()
    before = weights.cumsum(dim=0) - weights
    before[0] = 0.0
    # Equal values stay or go together: what counts is the mass before the first of them.
    first = torch.searchsorted(-kept, -kept)
    return kept[before[first] < top_p * weights.sum()][-1]
