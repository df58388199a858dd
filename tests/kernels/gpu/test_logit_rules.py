import math

import pytest
import torch
from charonia_kernels.draw_outcome import DrawOutcome
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.logit_rules import RulesConfig, apply_logit_rules, rules_config
from charonia_kernels.gpu.sampling import sample
from charonia_kernels.logit_rule_layout import RuleKind, bit_mask, build_rules
from charonia_kernels.reference.logit_rules import apply_logit_rules as reference
from charonia_kernels.sampling_params import NUM_PARAMS, pack
from support.gpu_kernels import DEVICE

VOCAB = 203
INF = math.inf
SMALL = RulesConfig(splits=3, block=16, num_warps=1, use_pdl=False)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE).reshape(len(values))


def run(rule_sets, tokens, *, num_prompt=2, min_tokens=0, config=None, logits=None):
    """Logits after one rule set for each row, all rows having the same tokens; they must be the reference's."""
    batch = len(rule_sets)
    pool, records = [7, 7, 7], []
    for entry, rules in enumerate(rule_sets):
        records += rules.records(entry, len(pool))
        pool += [*rules.words, -1]
    if logits is None:
        logits = torch.randn(batch, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = ints(range(batch))
    seq_lens = ints([len(tokens)] * batch)
    token_ids = ints([*tokens, 5, 5]).expand(batch, -1).contiguous()
    params = ints(pack(num_prompt=num_prompt, min_tokens=min_tokens)).expand(batch, NUM_PARAMS).contiguous()
    padded = ints([*records, 0, 0, 0, 0]).view(-1, 4)
    expected = logits.double()
    reference(expected, rows, seq_lens, token_ids, params, padded, ints(pool))
    apply_logit_rules(logits, rows, seq_lens, token_ids, params, padded, ints(pool), config=config)
    assert torch.allclose(logits.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    return logits


def excluded(logits, row=0):
    return (logits[row] == -INF).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("config", [None, SMALL])
def test_all_kinds_together(config):
    sets = [
        build_rules(VOCAB, bias={3: 1.5, 202: -100.0}),
        build_rules(VOCAB, allowed=[0, 31, 32, 63, 202]),
        build_rules(
            VOCAB, bad_words=[[9], [3, 4], [1, 2, 3, 11], [2, 3, 11, 12], [3, 3, 13]], stop_ids=[1, 2]
        ),
        build_rules(VOCAB),
        build_rules(VOCAB, bias={i: i / 7 for i in range(100)}, allowed=range(50, 150), bad_words=[[60]]),
    ]
    logits = run(sets, [9, 9, 1, 2, 3], min_tokens=4, config=config)
    assert excluded(logits) == []
    assert excluded(logits, 1) == sorted(set(range(VOCAB)) - {0, 31, 32, 63, 202})
    assert excluded(logits, 2) == [1, 2, 4, 9, 11]
    assert excluded(logits, 3) == []
    assert excluded(logits, 4) == sorted(set(range(VOCAB)) - set(range(50, 150)) | {60})


@pytest.mark.parametrize(("outputs", "banned"), [(0, []), (1, []), (2, [8]), (3, [8, 9])])
def test_bad_words_look_at_the_output_only(outputs, banned):
    tokens = [1, 2, 3, 3]
    logits = run([build_rules(VOCAB, bad_words=[[3, 3, 8], [2, 3, 3, 9]])], tokens, num_prompt=4 - outputs)
    assert excluded(logits) == banned


@pytest.mark.parametrize(("min_tokens", "banned"), [(0, []), (3, []), (4, [6, 7])])
def test_stop_tokens_wait_for_the_minimum_length(min_tokens, banned):
    assert (
        excluded(run([build_rules(VOCAB, stop_ids=[6, 7])], [1, 2, 3, 4, 5], min_tokens=min_tokens)) == banned
    )


def test_bias_does_not_bring_back_what_is_excluded():
    rules = build_rules(VOCAB, bias={4: 50.0, 5: 1.0}, bad_words=[[4]])
    assert excluded(run([rules], [1, 2])) == [4]


def test_failed_rows_stay_failed():
    logits = torch.zeros(1, VOCAB, device=DEVICE)
    logits[0, 4], logits[0, 5] = math.nan, INF
    assert run([build_rules(VOCAB, bad_words=[[4], [5]])], [1, 2], logits=logits)[0, 4:6].isnan().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_sampler_makes_of_rules_that_leave_nothing(temperature):
    rules = [build_rules(VOCAB, allowed=[4, 5], bad_words=[[1, 2, 4], [5]]) for _ in range(2)]
    rules.append(build_rules(VOCAB, allowed=[4, 5], bad_words=[[2, 2, 4], [5]]))
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    logits[1, 4] = math.nan
    run(rules, [1, 2], num_prompt=0, logits=logits)
    table = ints(pack(temperature=temperature, seed=1)).view(1, -1)
    drawn = sample(logits, ints([0, 0, 0]), ints([2, 2, 2]), table)
    assert drawn.outcomes.tolist() == [DrawOutcome.EXCLUDED, DrawOutcome.NOT_FINITE, DrawOutcome.DRAWN]
    assert drawn.tokens[2] == 4


def test_layout():
    assert bit_mask(40, [0, 31, 33]) == [1 - 2**31, 2]
    rules = build_rules(100, bias={1: 1.0}, bad_words=[[2], [3, 4]])
    assert [rule.kind for rule in rules.rules] == [RuleKind.BIAS, RuleKind.EXCLUDE, RuleKind.BAD_WORDS]
    assert rules.words == [1, 0x3F800000, 2, 1, 3, 1, 3, 4]
    assert rules.records(9, 1000) == [9, 1, 1000, 1, 9, 2, 1002, 1, 9, 5, 1003, 1]
    with pytest.raises(ValueError, match="100 is outside"):
        build_rules(100, stop_ids=[100])
    with pytest.raises(ValueError, match="empty"):
        build_rules(100, bad_words=[[]])


def test_nothing_to_do_bad_arguments_and_config():
    logits, params = torch.zeros(1, VOCAB, device=DEVICE), ints(pack()).view(1, -1)
    args = logits, ints([0]), ints([1]), ints([1]).view(1, 1), params
    apply_logit_rules(*args, torch.empty((0, 4), dtype=torch.int32, device=DEVICE), ints([0]))
    with pytest.raises(ValueError, match="records"):
        apply_logit_rules(*args, ints([1, 2, 3]).view(1, 3), ints([0]))
    assert rules_config(1, 128256, H100).splits == 32
    assert rules_config(5000, 128256, H100).splits == 1
