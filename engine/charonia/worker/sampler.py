"""From logits to tokens. A feature that no row of the batch uses costs nothing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from charonia.outputs import TokenLogprobs
from charonia.worker.batch import SampledRow
from charonia.worker.logits import NEG_INF, apply_constraints, apply_penalties
from charonia.worker.rows import RequestRows, RowState

CANDIDATES = 1024
"""Most likely tokens that are looked at first for top-k and top-p; a full sort follows only where they do not do."""


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """tokens: [S] int64. usable: [S] bool, false where the logits were not finite or every token was excluded; the
    token is then meaningless. logprobs: by index into S.
    """

    tokens: torch.Tensor
    usable: torch.Tensor
    logprobs: dict[int, TokenLogprobs]


def sample(logits: torch.Tensor, rows: RequestRows, sampled: list[SampledRow]) -> SamplerOutput:
    """Draw one token per row. logits: [S, V] in the model's dtype.

    The order of operations is vLLM's: log-probabilities are those of the unmodified logits; then bias, allowed tokens,
    minimum length and bad words; penalties; temperature; min_p, top_k and top_p.
    """
    logits = logits.float()
    states = [rows[item.row] for item in sampled]
    usable = torch.isfinite(logits.sum(dim=-1))
    wants_logprobs = [i for i, state in enumerate(states) if state.sampling.logprobs is not None]
    raw = logits[wants_logprobs].clone() if wants_logprobs else None
    if apply_constraints(logits, rows, sampled, states):
        usable &= logits.amax(dim=-1) > NEG_INF
    apply_penalties(logits, rows, sampled, states)
    tokens = logits.argmax(dim=-1)
    random = [i for i, state in enumerate(states) if not state.sampling.greedy]
    if random:
        picked = logits if len(random) == len(states) else logits[random]
        drawn = _draw(picked, [states[i] for i in random], [sampled[i].position for i in random])
        tokens[random] = drawn
    logprobs: dict[int, TokenLogprobs] = {}
    if raw is not None:
        counts = [states[i].sampling.logprobs or 0 for i in wants_logprobs]
        entries = gather_logprobs(raw, tokens[wants_logprobs], counts)
        logprobs = dict(zip(wants_logprobs, entries, strict=True))
    return SamplerOutput(tokens, usable, logprobs)


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens` [N] and of each row's `counts[i]` most likely tokens, under `logits` [N, V]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(-1, tokens[:, None])
    ranks = (logprobs > own).sum(dim=-1) + 1
    top = logprobs.topk(max(counts), dim=-1) if max(counts) > 0 else None
    token_list, own_list, rank_list = tokens.tolist(), own[:, 0].tolist(), ranks.tolist()
    top_ids = top.indices.tolist() if top is not None else [[]] * len(counts)
    top_values = top.values.tolist() if top is not None else [[]] * len(counts)
    return [
        TokenLogprobs([token_list[i], *top_ids[i][:k]], [own_list[i], *top_values[i][:k]], rank_list[i])
        for i, k in enumerate(counts)
    ]


def uniform(seeds: list[int], positions: list[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, position), by SplitMix64 (Steele et al., 2014) as a counter-based generator.

    What a request draws depends on its seed and position alone, never on the batch around it.
    """
    with np.errstate(over="ignore"):
        state = np.array(seeds, np.int64).view(np.uint64)
        # Mixed once before the position enters: neighbouring seeds must not share a shifted stream.
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + (np.array(positions, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    points: npt.NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return points


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def _draw(logits: torch.Tensor, states: list[RowState], positions: list[int]) -> torch.Tensor:
    """Sample each row by inverting its cumulative distribution. logits: [R, V] fp32 -> [R] int64."""
    device = logits.device
    temperature = torch.tensor([state.sampling.temperature for state in states], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    points = torch.from_numpy(uniform([state.seed for state in states], positions)).to(device)
    filtered = [i for i, state in enumerate(states) if _filters(state)]
    if not filtered:
        return _invert(probs, points)
    tokens = torch.empty(len(states), dtype=torch.int64, device=device)
    plain = [i for i in range(len(states)) if i not in set(filtered)]
    if plain:
        tokens[plain] = _invert(probs[plain], points[plain])
    tokens[filtered] = _draw_filtered(probs[filtered], [states[i] for i in filtered], points[filtered])
    return tokens


def _filters(state: RowState) -> bool:
    sampling = state.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The index at which each row's cumulative weight passes `points` of its total; zero weights are never chosen."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = points[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    last = torch.searchsorted(cumulative, cumulative[:, -1:], right=False)[:, 0]
    # NaN weights (a row that has failed already) must not lead out of bounds.
    return torch.minimum(index, last).clamp(max=weights.shape[-1] - 1)


def _draw_filtered(probs: torch.Tensor, states: list[RowState], points: torch.Tensor) -> torch.Tensor:
    """Sample from each row's most likely tokens, as top_k, top_p and min_p leave them."""
    vocab, device = probs.shape[-1], probs.device
    top_k = torch.tensor(
        [min(s.sampling.top_k, vocab) if s.sampling.top_k > 0 else vocab for s in states], device=device
    )
    top_p = torch.tensor([s.sampling.top_p for s in states], dtype=torch.float64, device=device)
    min_p = torch.tensor([s.sampling.min_p for s in states], device=device)
    count = min(CANDIDATES, vocab)
    best = probs.topk(count, dim=-1)
    mass = best.values.sum(dim=-1, dtype=torch.float64)
    # The candidates do when what lies beyond them would be cut off anyway.
    cut_by_min_p = best.values[:, -1] < min_p * best.values[:, 0]
    enough = (top_k <= count) | ((top_k == vocab) & (mass >= top_p)) | cut_by_min_p
    tokens = _draw_sorted(best.values, best.indices, top_k, top_p, min_p, points)
    if count < vocab and not bool(enough.all()):
        rest = (~enough).nonzero()[:, 0]
        full = probs[rest].sort(dim=-1, descending=True)
        tokens[rest] = _draw_sorted(
            full.values, full.indices, top_k[rest], top_p[rest], min_p[rest], points[rest]
        )
    return tokens


def _draw_sorted(
    values: torch.Tensor, indices: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    points: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """values: [R, C] the largest probabilities, descending; indices: their tokens. The first always stays.

    top_p applies to what top_k and min_p left, renormalised, as in vLLM.
    """
    rank = torch.arange(values.shape[-1], device=values.device)
    in_top_k = rank < top_k[:, None]
    keep = in_top_k & (values >= min_p[:, None] * values[:, :1])
    kept = values.double() * keep
    # Tokens beyond the candidates count towards the total unless the last candidate is cut off already.
    tail = torch.where(
        keep[:, -1] & (top_k > values.shape[-1]), 1.0 - values.sum(dim=-1, dtype=torch.float64), 0.0
    )
    before = kept.cumsum(dim=-1) - kept
    keep &= before < (top_p * (kept.sum(dim=-1) + tail))[:, None]
    keep[:, 0] = True
    choice = _invert(values * keep, points)
    return indices.gather(-1, choice[:, None])[:, 0]
