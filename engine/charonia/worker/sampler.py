"""From logits to tokens. A feature that no row of the batch uses costs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from charonia_kernels import Logprobs
from charonia_kernels.draw_outcome import DrawOutcome

from charonia.outputs import TokenLogprobs
from charonia.worker.batch import SampledRow
from charonia.worker.logit_rules import NEG_INF
from charonia.worker.logits import ALL_ALLOWED, apply_constraints, apply_penalties
from charonia.worker.logprobs import token_logprobs
from charonia.worker.rows import RequestRows, RowState

CANDIDATES = 512
"""Most likely tokens that are looked at first for top-k and top-p."""

MORE_CANDIDATES = 8192
"""Looked at next, for rows where the first do not do; then comes the whole vocabulary."""

NO_LIMIT = 1 << 40
"""A top_k beyond every vocabulary."""

SEARCH_BLOCK = 128
"""Weights that are summed up first when a token is looked for. Divides the vocabulary sizes in use."""


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """tokens: [S] int64. outcomes: [S] int32, of `DrawOutcome`; but for `DRAWN` the token is meaningless.
    logprobs: by index into S.
    """

    tokens: torch.Tensor
    outcomes: torch.Tensor
    logprobs: dict[int, TokenLogprobs]


def sample(
    logits: torch.Tensor,
    rows: RequestRows,
    sampled: list[SampledRow],
    allowed: Mapping[int, torch.Tensor] = ALL_ALLOWED,
) -> SamplerOutput:
    """Draw one token per row. logits: [S, V] in the model's dtype. allowed: [V] bool by row, of those under a grammar.

    The order of operations is vLLM's: log-probabilities are those of the unmodified logits; then bias, allowed tokens,
    grammars, minimum length and bad words; penalties; temperature; min_p, top_k and top_p.
    """
    logits = logits.float()
    states = [rows[item.row] for item in sampled]
    finite = torch.isfinite(logits.sum(dim=-1))
    outcomes = torch.where(finite, DrawOutcome.DRAWN, DrawOutcome.NOT_FINITE).int()
    reported = [i for i, state in enumerate(states) if state.sampling.logprobs is not None]
    logprobs = torch.log_softmax(logits[reported], dim=-1) if reported else None
    if apply_constraints(logits, rows, sampled, states, allowed):
        outcomes[finite & (logits.amax(dim=-1) == NEG_INF)] = DrawOutcome.EXCLUDED
    apply_penalties(logits, rows, sampled, states)
    tokens = _choose(logits, sampled, states)
    entries: list[TokenLogprobs] = []
    if logprobs is not None:
        counts = [states[i].sampling.logprobs or 0 for i in reported]
        entries = gather_logprobs(logprobs, tokens[reported], counts)
    return SamplerOutput(tokens, outcomes, dict(zip(reported, entries, strict=True)))


def gather_logprobs(logprobs: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Entries of `tokens` [N] and of each row's `counts[i]` most likely tokens in `logprobs` [N, V]."""
    own = logprobs.gather(-1, tokens[:, None])
    ranks = (logprobs > own).sum(dim=-1) + 1
    top = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
    return token_logprobs(Logprobs(own[:, 0], ranks, top.indices, top.values), tokens, counts)


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


def _choose(logits: torch.Tensor, sampled: list[SampledRow], states: list[RowState]) -> torch.Tensor:
    """The most likely token of greedy rows, a drawn one of the others. logits: [S, V] fp32 -> [S] int64."""
    random = [i for i, state in enumerate(states) if not state.sampling.greedy]
    if not random:
        return logits.argmax(dim=-1)
    picked = logits if len(random) == len(states) else logits[random]
    drawn = _draw(picked, [states[i] for i in random], [sampled[i].position for i in random])
    if picked is logits:
        return drawn
    tokens = logits.argmax(dim=-1)
    tokens[random] = drawn
    return tokens


def _draw(logits: torch.Tensor, states: list[RowState], positions: list[int]) -> torch.Tensor:
    """Sample each row by inverting its cumulative distribution, in the order of token ids.

    Filters only set the weights of what they cut to zero, so that no choice hangs on the order of nearly equal tokens.
    logits: [R, V] fp32, overwritten -> [R] int64.
    """
    device = logits.device
    temperature = torch.tensor([state.sampling.temperature for state in states], device=device)
    # Probabilities up to a factor: the most likely token has weight 1.
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None]).exp_()
    if any(_filters(state) for state in states):
        weights = torch.where(weights >= _cutoffs(weights, states)[:, None], weights, 0.0)
    points = torch.from_numpy(uniform([state.seed for state in states], positions)).to(device)
    return _invert(weights, points)


def _filters(state: RowState) -> bool:
    sampling = state.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _cutoffs(weights: torch.Tensor, states: list[RowState]) -> torch.Tensor:
    """The smallest weight that top_k, top_p and min_p keep in each row. weights: [R, V], at most 1 -> [R]."""
    vocab, device = weights.shape[-1], weights.device
    cutoffs = torch.tensor([state.sampling.min_p for state in states], device=device)
    ranked = [i for i, state in enumerate(states) if state.sampling.top_k > 0 or state.sampling.top_p < 1.0]
    if not ranked:
        return cutoffs
    params = [states[i].sampling for i in ranked]
    limits = _Limits(
        top_k=torch.tensor([p.top_k if p.top_k > 0 else NO_LIMIT for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
        min_p=cutoffs[ranked],
    )
    rest = torch.tensor(ranked, device=device)
    first = max(p.top_k if 0 < p.top_k <= CANDIDATES else CANDIDATES for p in params)
    for count in (first, MORE_CANDIDATES, vocab):
        part = weights if len(rest) == len(weights) else weights[rest]
        best = part.topk(min(count, vocab), dim=-1).values
        cutoffs[rest], certain = _ranked_cutoffs(best, _total(part), limits)
        if bool(certain.all()):
            break
        rest, limits = rest[~certain], limits.select(~certain)
    return cutoffs


@dataclass(frozen=True, slots=True)
class _Limits:
    """Of each row: top_k [R] int64 (`NO_LIMIT` for all tokens), top_p [R] fp64, min_p [R] fp32."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def select(self, rows: torch.Tensor) -> "_Limits":
        """Those of the rows that a mask picks."""
        return _Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def _ranked_cutoffs(
    best: torch.Tensor, total: torch.Tensor, limits: _Limits
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest kept weight of each row, and whether the candidates were enough to tell.

    best: [R, C] the largest weights, descending. total: [R] fp64, sum of all weights. top_p applies to what top_k and
    min_p left, renormalised, as in vLLM; the first always stays.
    """
    rank = torch.arange(best.shape[-1], device=best.device)
    keep = (rank < limits.top_k[:, None]) & (best >= limits.min_p[:, None])
    kept = torch.where(keep, best, 0.0).double()
    cumulative = kept.cumsum(dim=-1)
    # Whether top_k and min_p reach beyond the candidates.
    goes_on = keep[:, -1] & (limits.top_k > best.shape[-1])
    mass = torch.where(goes_on, total, cumulative[:, -1])
    keep &= cumulative - kept < (limits.top_p * mass)[:, None]
    last = keep.sum(dim=-1).clamp(min=1) - 1
    # Beyond the candidates, `total` is what top_p applies to only if neither of the others cuts there.
    unlimited = (limits.top_k == NO_LIMIT) & (limits.min_p == 0)
    certain = ~goes_on | (unlimited & (cumulative[:, -1] >= limits.top_p * total))
    return best.gather(-1, last[:, None])[:, 0], certain


def _blocks(weights: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R, blocks, SEARCH_BLOCK], padded with zeros."""
    padding = -weights.shape[-1] % SEARCH_BLOCK
    padded = F.pad(weights, (0, padding)) if padding else weights
    return padded.view(len(weights), -1, SEARCH_BLOCK)


def _total(weights: torch.Tensor) -> torch.Tensor:
    """[R, V] fp32 -> [R] fp64. Each block is summed in fp32, as in `_invert`."""
    return _blocks(weights).sum(dim=-1).sum(dim=-1, dtype=torch.float64)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The index at which each row's cumulative weight passes `points` [R] of its total; never one of zero weight.

    weights: [R, V] fp32, not negative -> [R] int64. First the block is found, then the token in it: one pass over the
    vocabulary, and no scan.
    """
    blocks = _blocks(weights)
    outer = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = points * outer[:, -1]
    block = _search(outer, targets)
    rows = torch.arange(len(weights), device=weights.device)
    before = torch.where(block > 0, outer[rows, block - 1], 0.0)
    inner = blocks[rows, block].cumsum(dim=-1, dtype=torch.float64)
    # NaN weights (a row that has failed already) must not lead out of bounds.
    return (block * SEARCH_BLOCK + _search(inner, targets - before)).clamp(max=weights.shape[-1] - 1)


def _search(cumulative: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Each row's first index whose cumulative weight exceeds its target, or the last index that adds any weight."""
    index = torch.searchsorted(cumulative, targets[:, None], right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(index, last)[:, 0].clamp(max=cumulative.shape[-1] - 1)
