"""The sampler against a naive oracle in fp64: what may be drawn, how often, and that no row disturbs another."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from charonia.core.step import NewRow, StepPlan
from charonia.sampling_params import SamplingParams
from charonia.worker.batch import SampledRow
from charonia.worker.logits import apply_constraints, apply_penalties
from charonia.worker.rows import RequestRows
from charonia.worker.sampler import (
    CANDIDATES,
    MORE_CANDIDATES,
    SEARCH_BLOCK,
    SamplerOutput,
    gather_logprobs,
    sample,
    uniform,
)
from charonia_kernels.draw_outcome import DrawOutcome

Array = npt.NDArray[np.float64]
MAX_LEN = 12_000
CPU = torch.device("cpu")


class Batch:
    """Rows that sample their next token, each after its own prompt and output."""

    def __init__(self, vocab: int) -> None:
        self.rows = RequestRows(
            max_num_seqs=16, max_model_len=MAX_LEN, block_size=MAX_LEN, vocab_size=vocab, device=CPU
        )
        self.sampled: list[SampledRow] = []

    def add(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int] = (0,),
        output: Sequence[int] = (),
        seed: int = 0,
        stop: Sequence[int] = (),
        bad_words: Sequence[list[int]] = (),
    ) -> "Batch":
        tokens = [*prompt, *output]
        row = len({item.row for item in self.sampled})
        new = NewRow(
            row, tokens, len(prompt), [1], len(tokens) - 1, params, seed, list(stop), list(bad_words)
        )
        self.rows.apply(StepPlan(0, [], new_rows=[new]))
        self.sampled.append(SampledRow(row, len(tokens)))
        return self

    def states(self) -> list[Any]:
        return [self.rows[item.row] for item in self.sampled]

    def sample(self, logits: torch.Tensor) -> SamplerOutput:
        return sample(logits.clone(), self.rows, self.sampled)


def draws(logits: torch.Tensor, params: SamplingParams, count: int = 10_000, seed: int = 0) -> list[int]:
    """The tokens that one request draws at `count` positions from the same logits [V]."""
    batch = Batch(len(logits)).add(params, seed=seed)
    found: list[int] = []
    for start in range(1, count, 5000):
        sampled = [SampledRow(0, position) for position in range(start, min(start + 5000, count + 1))]
        output = sample(logits.repeat(len(sampled), 1), batch.rows, sampled)
        assert not output.outcomes.any()
        found += output.tokens.tolist()
    return found


def oracle(logits: torch.Tensor, params: SamplingParams) -> Array:
    """Probabilities [V] after temperature, top_k, min_p and top_p; equals of the last one kept are kept too."""
    scaled = logits.double().numpy() / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.sort(probs)[::-1]
    kept = order[: params.top_k] if params.top_k > 0 else order
    kept = kept[kept >= params.min_p * order[0]]
    before = np.cumsum(kept) - kept
    kept = kept[(before < params.top_p * kept.sum()) | (np.arange(len(kept)) == 0)]
    probs[probs < kept[-1]] = 0.0
    return probs / probs.sum()


def assert_distributed(tokens: Sequence[int], probs: Array) -> None:
    """Chi-square, to five standard deviations: seeds are fixed, so this either always fails or never."""
    counts = np.bincount(tokens, minlength=len(probs)).astype(np.float64)
    assert not counts[probs == 0.0].any()
    support = probs > 0.0
    expected = probs[support] * len(tokens)
    statistic = ((counts[support] - expected) ** 2 / expected).sum()
    freedom = int(support.sum()) - 1
    assert statistic <= freedom + 5.0 * math.sqrt(2.0 * freedom)


def gaussian(*shape: int, seed: int = 3, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---- distribution ----


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocab", [2, 50, SEARCH_BLOCK, SEARCH_BLOCK + 1])
def test_temperature(temperature: float, vocab: int) -> None:
    logits = gaussian(vocab)
    params = SamplingParams(temperature=temperature)
    assert_distributed(draws(logits, params), oracle(logits, params))


FILTERS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": CANDIDATES},
    {"top_k": CANDIDATES + 1},
    {"top_k": 560},
    {"top_k": 10**9},
    {"top_k": -1},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.5},
    {"min_p": 0.15},
    {"min_p": 1.0},
    {"min_p": 0.4, "top_p": 0.9},
    {"min_p": 0.2, "top_p": 0.9},
    {"top_k": 540, "top_p": 0.95},
    {"top_k": 40, "top_p": 0.5},
    {"top_k": 540, "top_p": 0.9, "min_p": 0.3},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters(filters: dict[str, Any]) -> None:
    """A nearly flat distribution over more tokens than are looked at first: every token that may come does come."""
    logits = gaussian(560, scale=0.2)
    params = SamplingParams(temperature=0.6, **filters)
    probs = oracle(logits, params)
    tokens = draws(logits, params)
    assert set(tokens) == set(np.flatnonzero(probs).tolist())
    assert_distributed(tokens, probs)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_on_a_peaked_distribution(filters: dict[str, Any]) -> None:
    logits = gaussian(3000, scale=3.0)
    params = SamplingParams(**filters)
    probs = oracle(logits, params)
    counts = np.bincount(draws(logits, params, 2000), minlength=3000)
    assert not counts[probs == 0.0].any()
    likely = np.argsort(probs)[-5:]
    error = np.abs(counts[likely] / 2000 - probs[likely])
    assert (error <= 5.0 * np.sqrt(probs[likely] / 2000)).all()


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 9000}, {"min_p": 0.5, "top_p": 0.9}], ids=str)
def test_filters_over_large_vocabularies(filters: dict[str, Any]) -> None:
    """More tokens stay than are looked at first, and next."""
    vocab = 12_000
    logits = gaussian(1, vocab, scale=0.05)
    probs = oracle(logits[0], SamplingParams(**filters))
    batch = Batch(vocab)
    for seed in range(16):
        batch.add(SamplingParams(**filters), seed=seed)
    tokens = batch.sample(logits.repeat(16, 1)).tokens
    order = np.argsort(-probs, kind="stable")
    assert np.count_nonzero(probs) > MORE_CANDIDATES
    assert (probs[tokens.numpy()] > 0.0).all()
    assert np.isin(tokens.numpy(), order[MORE_CANDIDATES:]).any()


def test_filters_of_different_rows_do_not_mix() -> None:
    logits = gaussian(16, 560, scale=0.3)
    batch = Batch(560)
    for filters in FILTERS[:16]:
        batch.add(SamplingParams(**filters), seed=5)
    together = batch.sample(logits).tokens.tolist()
    alone = [
        Batch(560).add(SamplingParams(**filters), seed=5).sample(logits[i : i + 1]).tokens.item()
        for i, filters in enumerate(FILTERS[:16])
    ]
    assert together == alone


def test_equals_of_the_last_kept_token_are_kept() -> None:
    logits = torch.zeros(10)
    logits[7] = 1.0
    assert set(draws(logits, SamplingParams(top_k=3), 2000)) == set(range(10))
    assert set(draws(logits, SamplingParams(top_p=0.5), 2000)) == set(range(10))
    assert set(draws(logits, SamplingParams(top_p=0.01), 2000)) == {7}
    assert set(draws(logits, SamplingParams(min_p=0.9), 2000)) == {7}


@pytest.mark.parametrize("vocab", [1, 2, 3, 130])
@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_tiny_vocabularies(vocab: int, filters: dict[str, Any]) -> None:
    logits = gaussian(vocab)
    params = SamplingParams(**filters)
    assert_distributed(draws(logits, params, 3000) + [0] * (vocab == 1), oracle(logits, params))


def test_extreme_logits() -> None:
    logits = torch.full((300,), -1e30)
    logits[[11, 222]] = 1e37
    assert set(draws(logits, SamplingParams(), 500)) == {11, 222}
    assert set(draws(logits, SamplingParams(temperature=100.0, top_p=0.999), 500)) == {11, 222}
    logits[11] = 9e36
    assert set(draws(logits, SamplingParams(temperature=1e-4), 500)) == {222}


@pytest.mark.parametrize("vocab", [7, 300, 1200])
@pytest.mark.parametrize(("point", "drawn"), [(0.0, 2), (1.0 - 2.0**-53, -3)])
def test_ends_of_the_distribution(
    vocab: int, point: float, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest and the largest random number lead to the first and the last token of any weight."""
    monkeypatch.setattr("charonia.worker.sampler.uniform", lambda seeds, _: np.full(len(seeds), point))
    logits = torch.full((1, vocab), -math.inf)
    logits[0, [2, 3, -4, -3]] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    logits[0, [0, 1, -2, -1]] = -1e4
    logits = logits.clamp(min=-2e4)
    for params in (
        SamplingParams(),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.999),
        SamplingParams(min_p=0.1),
    ):
        assert Batch(vocab).add(params).sample(logits).tokens.item() == drawn % vocab


def test_rounding_at_the_end_leads_to_no_excluded_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "charonia.worker.sampler.uniform", lambda seeds, _: np.full(len(seeds), 1.0 - 2.0**-53)
    )
    logits = gaussian(16, 1000)
    logits[:, -40:] = -1e4
    batch = Batch(1000)
    for _ in range(16):
        batch.add(SamplingParams())
    assert batch.sample(logits).tokens.tolist() == [959] * 16


# ---- greedy ----


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = gaussian(1, 900)
    logits[0, [400, 250, 800]] = 9.0
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1e-6),
        SamplingParams(top_k=1),
    ):
        assert Batch(900).add(params).sample(logits).tokens.tolist() == [250]


def test_greedy_and_random_rows_in_one_batch() -> None:
    logits = gaussian(3, 400)
    greedy, random = SamplingParams(temperature=0.0), SamplingParams(seed=1)
    batch = Batch(400).add(greedy).add(random, seed=4).add(greedy)
    tokens = batch.sample(logits).tokens.tolist()
    best = logits.argmax(dim=-1).tolist()
    alone = Batch(400).add(random, seed=4).sample(logits[1:2]).tokens.item()
    assert tokens == [best[0], alone, best[2]]


# ---- seeds ----


def test_draws_depend_on_seed_and_position_alone() -> None:
    logits = gaussian(6, 1500)
    params = SamplingParams(temperature=1.3, top_p=0.95)
    others = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(min_p=0.1),
    ]
    expected = Batch(1500).add(params, seed=-7, output=[1, 2]).sample(logits[:1]).tokens.item()
    for place in range(5):
        batch = Batch(1500)
        order = [*others[:place], params, *others[place:]]
        for i, entry in enumerate(order):
            batch.add(entry, seed=-7 if entry is params else i, output=[1, 2] if entry is params else [])
        shuffled = logits[1:6].clone()
        shuffled[place] = logits[0]
        assert batch.sample(shuffled).tokens[place].item() == expected


def test_seeds_and_positions_give_independent_numbers() -> None:
    seeds, positions = np.meshgrid(np.arange(-100, 100), np.arange(200), indexing="ij")
    points = uniform(seeds.ravel().tolist(), positions.ravel().tolist()).reshape(200, 200)
    assert points.min() >= 0.0 and points.max() < 1.0
    assert_distributed((points.ravel() * 100).astype(int).tolist(), np.full(100, 0.01))
    neighbours = [
        (points[:-1], points[1:]),
        (points[:, :-1], points[:, 1:]),
        (points[:-1, 1:], points[1:, :-1]),
    ]
    for a, b in neighbours:
        cells = (a * 10).astype(int) * 10 + (b * 10).astype(int)
        assert_distributed(cells.ravel().tolist(), np.full(100, 0.01))


def test_extreme_seeds_and_positions() -> None:
    seeds = [-(2**63), 2**63 - 1, 0, -1]
    assert len(set(uniform(seeds, [0, 0, 0, 0]).tolist())) == 4
    assert len(set(uniform([5] * 4, [0, 1, 2**31, 2**40]).tolist())) == 4
    # SplitMix64 adds this to its state at each position.
    step = 0x9E3779B97F4A7C15 - 2**64
    assert not np.intersect1d(uniform([0] * 50, list(range(50))), uniform([step] * 50, list(range(50)))).size


# ---- constraints and penalties ----


def constrained(logits: torch.Tensor, params: SamplingParams, **fields: Any) -> torch.Tensor:
    """One row's logits [V] after its constraints."""
    batch = Batch(len(logits)).add(params, **fields)
    changed = logits[None].clone()
    apply_constraints(changed, batch.rows, batch.sampled, batch.states())
    return changed[0]


def test_penalties_follow_their_formulae() -> None:
    vocab = 60
    rng = np.random.default_rng(0)
    batch, expected = Batch(vocab), []
    logits = gaussian(8, vocab, scale=4.0)
    for i in range(8):
        prompt = rng.integers(0, vocab, 9).tolist()
        output = rng.integers(0, vocab, (0, 1, 30)[i % 3]).tolist()
        params = SamplingParams(
            repetition_penalty=(1.0, 1.7, 0.6)[i % 3],
            frequency_penalty=(0.0, 0.7, -0.4)[(i + 1) % 3],
            presence_penalty=(0.0, 1.1, -2.0)[i // 3],
        )
        batch.add(params, prompt=prompt, output=output)
        row = logits[i].double().numpy().copy()
        for token in set(prompt + output):
            row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
        for token in set(output):
            row[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
        expected.append(row)
    apply_penalties(logits, batch.rows, batch.sampled, batch.states())
    np.testing.assert_allclose(logits.numpy(), np.stack(expected), rtol=1e-5, atol=1e-5)


def test_bias_and_allowed_tokens() -> None:
    logits = gaussian(50)
    params = SamplingParams(logit_bias={3: 1.5, 4: -100, 9: 2}, allowed_token_ids=[3, 5, 9, 9])
    changed = constrained(logits, params)
    assert torch.isfinite(changed).nonzero()[:, 0].tolist() == [3, 5, 9]
    torch.testing.assert_close(changed[[3, 5, 9]], logits[[3, 5, 9]] + torch.tensor([1.5, 0.0, 2.0]))
    torch.testing.assert_close(constrained(logits, SamplingParams(logit_bias={4: -1}))[4], logits[4] - 1.0)


@pytest.mark.parametrize(("num_output", "suppressed"), [(0, True), (2, True), (3, False), (9, False)])
def test_min_tokens_suppress_stop_tokens(num_output: int, suppressed: bool) -> None:
    params = SamplingParams(min_tokens=3)
    changed = constrained(gaussian(50), params, prompt=[7] * 4, output=[1] * num_output, stop=[7, 8])
    assert torch.isinf(changed).nonzero()[:, 0].tolist() == ([7, 8] if suppressed else [])


def test_bad_words_count_the_output_alone() -> None:
    words = [[9], [1, 2], [5, 1, 3], [4, 4, 4, 4], [8, 1, 2], [6, 2]]
    cases: list[tuple[list[int], list[int], set[int]]] = [
        ([5, 1], [], {9}),
        ([5], [1], {9, 2}),
        ([0], [5, 1], {9, 2, 3}),
        ([0], [8, 1], {9, 2}),
        ([4], [4, 4], {9}),
        ([0], [0, 0, 4, 4, 4], {9, 4}),
        ([1] * 20, [7] * 20, {9}),
    ]
    for prompt, output, banned in cases:
        changed = constrained(gaussian(50), SamplingParams(), prompt=prompt, output=output, bad_words=words)
        assert set(torch.isinf(changed).nonzero()[:, 0].tolist()) == banned


def test_constraints_leave_other_rows_alone() -> None:
    logits = gaussian(3, 50)
    batch = (
        Batch(50)
        .add(SamplingParams(temperature=0.0))
        .add(SamplingParams(temperature=0.0, allowed_token_ids=[2], repetition_penalty=2.0))
        .add(SamplingParams(temperature=0.0))
    )
    tokens = batch.sample(logits).tokens.tolist()
    assert tokens == [int(logits[0].argmax()), 2, int(logits[2].argmax())]


# ---- logprobs ----


def assert_logprobs(entry: Any, raw: torch.Tensor, token: int, count: int) -> None:
    exact = torch.log_softmax(raw.double(), dim=-1)
    assert entry.token_ids[0] == token
    assert entry.rank == 1 + int((exact > exact[token]).sum())
    best = exact.topk(min(count, len(exact)))
    assert entry.token_ids[1:] == best.indices.tolist()
    expected = [exact[token].item(), *best.values.tolist()]
    np.testing.assert_allclose(entry.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = gaussian(5, 300, scale=2.0)
    requests = [
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=2.0, top_k=4, logprobs=0),
        SamplingParams(temperature=1.5, repetition_penalty=3.0, logit_bias={5: 50.0}, logprobs=20),
        SamplingParams(temperature=0.0),
        SamplingParams(allowed_token_ids=[17], logprobs=1),
    ]
    batch = Batch(300)
    for i, params in enumerate(requests):
        batch.add(params, seed=i)
    output = batch.sample(logits)
    assert sorted(output.logprobs) == [0, 1, 2, 4]
    for i, entry in output.logprobs.items():
        assert_logprobs(entry, logits[i], int(output.tokens[i]), requests[i].logprobs or 0)


def test_logprobs_of_a_vocabulary_smaller_than_asked_for() -> None:
    logits = gaussian(1, 3)
    output = Batch(3).add(SamplingParams(logprobs=20)).sample(logits)
    assert_logprobs(output.logprobs[0], logits[0], int(output.tokens[0]), 20)


def test_logprobs_of_given_tokens() -> None:
    logits = gaussian(4, 40)
    tokens = torch.tensor([3, 39, 0, 7])
    entries = gather_logprobs(torch.log_softmax(logits, dim=-1), tokens, [2, 0, 5, 1])
    for i, count in enumerate((2, 0, 5, 1)):
        assert_logprobs(entries[i], logits[i], int(tokens[i]), count)


# ---- failures ----


@pytest.mark.parametrize("vocab", [5, 2000])
def test_broken_rows_disturb_no_other(vocab: int) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 2},
        {"min_p": 0.1},
        {"logprobs": 2, "repetition_penalty": 1.2},
    ]
    nan, inf = math.nan, math.inf
    for poison in (nan, inf, -inf):
        logits = gaussian(2 * len(kinds), vocab)
        broken = logits.clone()
        broken[::2] = poison
        broken[0, 1:] = 0.0
        tokens = []
        for values in (logits, broken):
            batch = Batch(vocab)
            for i, kind in enumerate(kinds):
                batch.add(SamplingParams(**kind), seed=i).add(SamplingParams(**kind), seed=100 + i)
            output = batch.sample(values)
            assert all(0 <= token < vocab for token in output.tokens.tolist())
            assert not output.outcomes[1::2].any()
            tokens.append(output.tokens[1::2].tolist())
        assert output.outcomes[::2].tolist() == [DrawOutcome.NOT_FINITE] * len(kinds)
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "kind", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}], ids=str
)
def test_every_token_excluded(kind: dict[str, Any]) -> None:
    logits = gaussian(2, 300)
    params = SamplingParams(allowed_token_ids=[4], min_tokens=2, **kind)
    batch = Batch(300).add(params, stop=[4]).add(SamplingParams(temperature=0.0))
    output = batch.sample(logits)
    assert output.outcomes.tolist() == [DrawOutcome.EXCLUDED, DrawOutcome.DRAWN]
    assert 0 <= output.tokens[0] < 300 and output.tokens[1] == logits[1].argmax()


def test_half_precision_logits() -> None:
    logits = gaussian(1, 100).to(torch.bfloat16)
    output = Batch(100).add(SamplingParams(temperature=0.0, logprobs=1)).sample(logits)
    assert output.tokens.item() == int(logits.float().argmax())
    assert_logprobs(output.logprobs[0], logits[0].float(), int(output.tokens[0]), 1)
