import math

import pytest
import torch
from charonia_kernels.draw_outcome import DrawOutcome
from charonia_kernels.gpu._launch import H100, INTERPRETED
from charonia_kernels.gpu.sampling import SampleConfig, SampledTokens, SampleScratch, sample, sample_config
from charonia_kernels.gpu.sampling_filters import FilterConfig, filter_config, filter_thresholds
from charonia_kernels.reference import sampling as reference
from charonia_kernels.sampling_params import (
    INVERSE_TEMPERATURE,
    NUM_PARAMS,
    TOP_K,
    TOP_P,
    float_bits,
    int32,
    pack,
)
from support.gpu_kernels import DEVICE

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(batch, vocab, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, vocab, generator=generator) * scale).to(dtype).to(DEVICE)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE).reshape(len(values))


def table(*rows):
    return torch.tensor([pack(**row) for row in rows], dtype=torch.int32, device=DEVICE).view(-1, NUM_PARAMS)


def assert_sampled(result, logits, rows, seq_lens, params, thresholds=None):
    """The reference's tokens, up to scores that differ by less than fp32 can tell."""
    tokens, outcomes = reference.sample(logits, rows, seq_lens, params, thresholds)
    assert torch.equal(result.outcomes, outcomes)
    scores = reference.scores(logits, rows, seq_lens, params, thresholds)
    good = outcomes == DrawOutcome.DRAWN
    loss = scores.amax(dim=-1) - scores.gather(-1, result.tokens.long()[:, None])[:, 0]
    assert (loss[good] <= 2e-5 * (1 + scores.amax(dim=-1)[good].abs())).all()
    assert ((result.tokens >= 0) & (result.tokens < logits.shape[1])).all()
    assert (result.tokens == tokens)[good].float().mean() > 0.9 or not good.any()


def test_packing():
    words = pack(temperature=0.7, top_p=0.9, top_k=-1, seed=-2, min_tokens=1 << 40)
    assert len(words) == NUM_PARAMS
    assert all(-(2**31) <= word < 2**31 for word in words)
    assert words[INVERSE_TEMPERATURE] == float_bits(1 / 0.7)
    assert words[TOP_P] == float_bits(0.9)
    assert words[TOP_K] == 0
    assert (int32(2**31), int32(-1), int32(2**32 + 7)) == (-(2**31), -1, 7)


@pytest.mark.parametrize("batch", [1, 7, 64, 300, 512])
@pytest.mark.parametrize("vocab", [1, 100, 32000, 128256, 151936, 262144])
def test_config_covers_the_vocabulary(batch, vocab):
    config = sample_config(batch, vocab, H100)
    assert (config.splits - 1) * config.tiles * 2048 < vocab <= config.splits * config.tiles * 2048
    filters = filter_config(vocab, H100)
    assert filters.chunk % 128 == 0
    assert filters.keep * -(-vocab // filters.chunk) <= 8192


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 97, 2048, 5003])
def test_greedy_takes_the_largest(dtype, vocab):
    logits = make(3, vocab, dtype)
    result = sample(logits, ints([0, 1, 0]), ints([5, 6, 7]), table({}, {"temperature": 0.0, "top_k": 3}))
    assert torch.equal(result.tokens.long(), logits.float().argmax(dim=-1))
    assert not result.outcomes.any()


def test_greedy_takes_the_first_of_equals():
    logits = torch.full((3, 9001), -1.0, device=DEVICE)
    logits[0, [17, 600, 4000, 9000]] = 2.0
    logits[1, 5000], logits[1, 8000] = -0.0, 0.0
    for config in (None, SampleConfig(1, 5, 4, False), SampleConfig(5, 1, 4, False)):
        result = sample(logits, ints([0, 0, 0]), ints([1, 1, 1]), table({}), config=config)
        assert result.tokens.tolist() == [17, 5000, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 97, 5003])
def test_draws_are_the_references(dtype, vocab):
    logits = make(4, vocab, dtype)
    params = table({"temperature": 1.3, "seed": 7}, {}, {"temperature": 0.6, "seed": -(2**40) - 3})
    rows, seq_lens = ints([0, 1, 2, 0]), ints([5, 6, 70000, 6])
    assert_sampled(sample(logits, rows, seq_lens, params), logits, rows, seq_lens, params)


def test_a_row_does_not_depend_on_batch_or_splits():
    logits = make(3, 9000, torch.bfloat16)
    params = table({"temperature": 1.0, "seed": 100}, {"temperature": 2.0, "seed": 101}, {})
    rows, seq_lens = ints([1, 2, 0]), ints([9, 8, 7])
    whole = sample(logits, rows, seq_lens, params)
    for config in (SampleConfig(1, 5, 4, False), SampleConfig(3, 2, 4, False)):
        again = sample(logits, rows, seq_lens, params, config=config)
        assert torch.equal(again.tokens, whole.tokens)
    for i in range(3):
        alone = sample(logits[i : i + 1], rows[i : i + 1], seq_lens[i : i + 1], params)
        assert alone.tokens[0] == whole.tokens[i]


def test_seed_and_position_both_matter():
    logits = torch.zeros(4, 3000, device=DEVICE)
    params = table({"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1 + (1 << 32)})
    result = sample(logits, ints([0, 0, 1, 0]), ints([4, 5, 4, 4]), params)
    first, other_position, other_seed, same = result.tokens.tolist()
    assert first == same
    assert len({first, other_position, other_seed}) == 3


def test_draws_follow_the_distribution():
    """Chi-square over 7 tokens: 22.5 is passed once in a thousand; the seeds are fixed."""
    number, temperature = 4000, 0.8
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -INF], device=DEVICE)
    params = table({"temperature": temperature, "seed": 2024})
    rows, positions = torch.zeros(number, dtype=torch.int32, device=DEVICE), ints(range(number))
    tokens, _ = reference.sample(logits.expand(number, 8), rows, positions, params)
    expected = (logits.double() / temperature).softmax(dim=-1) * number
    counts = torch.bincount(tokens.long(), minlength=8).double()
    assert counts[7] == 0
    assert float(((counts - expected) ** 2 / expected)[:7].sum()) < 22.5
    count = 40 if INTERPRETED else number
    drawn = sample(logits.expand(count, 8), rows[:count], positions[:count], params).tokens
    assert (drawn == tokens[:count]).float().mean() > 0.999


def test_noise_is_gumbel():
    noise = reference.gumbel(200_000, 3, 4, 5, torch.device("cpu"))
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    assert abs(float((noise < 0).double().mean()) - math.exp(-1)) < 0.005


def test_philox_known_answers():
    """With ten rounds the published vector of Random123 for zeros; the kernel uses seven of the same rounds."""
    rounds, reference.ROUNDS = reference.ROUNDS, 10
    try:
        words = reference.philox(torch.zeros(1, dtype=torch.int64), 0, 0, 0)
    finally:
        reference.ROUNDS = rounds
    assert [hex(word) for word in words[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@pytest.mark.parametrize("drawn", [False, True])
def test_logits_that_are_not_usable(drawn):
    logits = make(7, 4100)
    logits[0, 7] = INF
    logits[1, 4099] = math.nan
    logits[2] = -INF
    logits[3] = math.nan
    logits[4] = -INF
    logits[4, 3] = math.nan
    logits[5, :4000] = -INF
    params, rows, seq_lens = (
        table({"temperature": 1.0 if drawn else 0.0, "seed": 3}),
        ints([0] * 7),
        ints(range(7)),
    )
    result = sample(logits, rows, seq_lens, params)
    broken, none_left = DrawOutcome.NOT_FINITE, DrawOutcome.EXCLUDED
    assert result.outcomes.tolist() == [broken, broken, none_left, broken, broken, 0, 0]
    assert_sampled(result, logits, rows, seq_lens, params)
    assert result.tokens[5] >= 4000


def test_scratch_is_left_as_it_was():
    scratch = SampleScratch.allocate(8, DEVICE)
    before = scratch.best.clone(), scratch.arrived.clone()
    logits = make(3, 5000)
    logits[1, 3] = math.nan
    out = SampledTokens(ints([-1] * 4), ints([-1] * 4))
    args = logits, ints([0, 0, 0]), ints([1, 2, 3]), table({"temperature": 1.0})
    assert sample(*args, scratch=scratch, out=out) is out
    assert torch.equal(scratch.best, before[0])
    assert torch.equal(scratch.arrived, before[1])
    assert out.tokens[3] == -1
    assert torch.equal(out.tokens[:3], sample(*args).tokens)


def test_empty_batch_and_strided_logits():
    empty = torch.empty(0, 64, device=DEVICE)
    params = table({"temperature": 1.0, "top_k": 5})
    assert sample(empty, ints([]), ints([]), params).tokens.shape == (0,)
    assert filter_thresholds(empty, ints([]), params).shape == (0,)
    wide = torch.full((3, 100), math.nan, device=DEVICE)
    wide[:, :77] = make(3, 77)
    rows, seq_lens = ints([0, 0, 0]), ints([1, 2, 3])
    assert_sampled(sample(wide[:, :77], rows, seq_lens, params), wide[:, :77], rows, seq_lens, params)
    expected = reference.filter_thresholds(wide[:, :77], rows, params)
    assert torch.equal(filter_thresholds(wide[:, :77], rows, params), expected)


def test_bad_arguments():
    logits, params = make(2, 64), table({})
    with pytest.raises(ValueError, match="rows must be 2 int32"):
        sample(logits, ints([0]), ints([1, 2]), params)
    with pytest.raises(ValueError, match="seq_lens"):
        sample(logits, ints([0, 0]), ints([1]), params)
    with pytest.raises(ValueError, match="params"):
        filter_thresholds(logits, ints([0, 0]), params[:, :8])
    with pytest.raises(ValueError, match="scratch for 1"):
        sample(logits, ints([0, 0]), ints([1, 2]), params, scratch=SampleScratch.allocate(1, DEVICE))


SMALL = FilterConfig(512, keep=32, chunk_warps=4, chunk_registers=128, search_warps=2, use_pdl=False)
"""Few values are copied, so that searches of the whole row happen."""


def check_filters(logits, params, config=None):
    """Thresholds are exact; those of top_p may differ where its mass is reached up to rounding."""
    rows = ints(range(len(params)))
    actual = filter_thresholds(logits, rows, params, config=config)
    expected = reference.filter_thresholds(logits, rows, params)
    for i in range(len(params)):
        if actual[i] == expected[i]:
            continue
        top_p = float(reference.float_column(params, rows, TOP_P)[i])
        assert top_p < 1.0, f"row {i}: {actual[i].item()!r}, expected {expected[i].item()!r}"
        scaled = logits[i].float() * reference.float_column(params, rows, INVERSE_TEMPERATURE)[i]
        loose, tight = params[i : i + 1].clone(), params[i : i + 1].clone()
        loose[0, TOP_P], tight[0, TOP_P] = float_bits(top_p * (1 + 1e-5)), float_bits(top_p * (1 - 1e-5))
        zero = ints([0])
        low = reference.filter_thresholds(logits[i : i + 1], zero, loose)[0]
        high = reference.filter_thresholds(logits[i : i + 1], zero, tight)[0]
        assert low <= actual[i] <= high, f"row {i}: {actual[i].item()!r}, expected {expected[i].item()!r}"
        assert (scaled == actual[i]).any()
    return actual


FILTERS = [
    {"top_k": 1}, {"top_k": 50}, {"top_k": 700}, {"top_k": 1300}, {"top_k": 100_000}, {"top_p": 0.9},
    {"top_p": 0.99999}, {"top_p": 1e-6}, {"top_p": 1e-45}, {"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 1e-9},
    {"top_k": 50, "top_p": 0.9}, {"top_k": 40, "top_p": 0.5, "min_p": 0.3}, {"min_p": 1e-6, "top_p": 0.95}, {},
    {"top_k": 300, "top_p": 0.7}, {"top_k": 1, "top_p": 0.1, "min_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize(
    ("vocab", "dtype", "config", "scale"),
    [
        (1, torch.float32, SMALL, 1.0),
        (33, torch.bfloat16, SMALL, 1.0),
        (1541, torch.float32, SMALL, 0.5),
        (1541, torch.bfloat16, SMALL, 5.0),
        (1541, torch.float16, None, 2.0),
    ],
)
def test_thresholds(vocab, dtype, config, scale):
    logits = make(len(FILTERS), vocab, dtype, scale=scale)
    params = table(*[{"temperature": 0.5 + 0.1 * i, **item} for i, item in enumerate(FILTERS)])
    actual = check_filters(logits, params, config)
    assert actual[15] == -INF


def test_thresholds_with_ties_and_exclusions():
    logits = make(8, 700)
    logits[0] = 1.0
    logits[1] = logits[1].round()
    logits[2] = torch.where(logits[2] > 0, 4.0, -4.0)
    logits[3, 3:] = -INF
    logits[4] = -INF
    logits[5, 100:] = 0.0
    logits[6, ::2] = -0.0
    logits[7] = -INF
    logits[7, 634] = -30000.0
    for item in ({"top_k": 2}, {"top_k": 40}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.3}, {"min_p": 0.5}):
        check_filters(logits, table(*[{"temperature": 0.9, **item}] * 8), SMALL)


def test_greedy_rows_have_no_threshold_and_rows_do_not_mix():
    logits = make(4, 900)
    params = table({"top_k": 3}, {"temperature": 1.0, "top_k": 3}, {"temperature": 2.0, "top_p": 0.4})
    together = filter_thresholds(logits, ints([0, 1, 2, 1]), params)
    assert together[0] == -INF
    for i, row in enumerate([0, 1, 2, 1]):
        assert filter_thresholds(logits[i : i + 1], ints([row]), params)[0] == together[i]


def test_not_a_number_ends_the_search():
    logits = make(3, 700)
    logits[0] = math.nan
    logits[1, 5], logits[2, :] = math.nan, INF
    params = table(*[{"temperature": 1.0, "top_p": 0.9, "top_k": 20}] * 3)
    out = torch.full((3,), math.nan, device=DEVICE)
    filter_thresholds(logits, ints([0, 1, 2]), params, out=out, config=SMALL)
    assert out[0] == -INF
    assert out[1].isfinite()


def test_draws_stay_above_the_threshold():
    logits = make(6, 4500, torch.bfloat16)
    params = table(*[{"temperature": 1.5, "top_k": 4, "seed": i} for i in range(5)], {})
    rows, seq_lens = ints(range(6)), ints([3] * 6)
    thresholds = filter_thresholds(logits, rows, params)
    result = sample(logits, rows, seq_lens, params, thresholds)
    assert_sampled(result, logits, rows, seq_lens, params, thresholds)
    best = logits.float().topk(4, dim=-1).indices
    assert (best == result.tokens[:, None]).any(dim=-1).all()
