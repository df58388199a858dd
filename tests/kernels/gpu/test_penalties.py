import math

import pytest
import torch
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.penalties import PenaltyConfig, allocate_counts, apply_penalties, penalty_config
from charonia_kernels.reference.penalties import apply_penalties as reference
from charonia_kernels.sampling_params import NUM_PARAMS, pack
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close

ROWS = [
    {"num_prompt": 10},
    {"repetition": 1.3, "num_prompt": 10},
    {"frequency": 0.5, "num_prompt": 3},
    {"presence": -0.7, "num_prompt": 100},
    {"repetition": 0.8, "frequency": -0.2, "presence": 1.5, "num_prompt": 40},
    {"repetition": 2.0, "frequency": 0.1, "num_prompt": 5000},
]
SMALL = PenaltyConfig(2, block=64, num_warps=2, use_pdl=False)


def table(rows):
    return torch.tensor([pack(**row) for row in rows], dtype=torch.int32, device=DEVICE).view(-1, NUM_PARAMS)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE).reshape(len(values))


def make(batch, vocab, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=generator) * 4
    tokens = torch.randint(0, vocab, (len(ROWS), length), generator=generator, dtype=torch.int32)
    return logits.to(DEVICE), tokens.to(DEVICE)


def check(logits, rows, seq_lens, tokens, counts=None, config=None):
    expected, before = logits.double(), logits.clone()
    reference(expected, rows, seq_lens, tokens, table(ROWS))
    apply_penalties(logits, rows, seq_lens, tokens, table(ROWS), counts, config=config)
    assert_close(logits, expected, scale=16.0)
    untouched = expected == before.double()
    assert torch.equal(logits[untouched], before[untouched])


@pytest.mark.parametrize(("vocab", "length"), [(1, 7), (13, 60), (997, 300)])
@pytest.mark.parametrize("config", [None, SMALL])
def test_penalties(vocab, length, config):
    logits, tokens = make(9, vocab, length)
    rows, seq_lens = (
        ints([4, 0, 1, 2, 3, 5, 4, 1, 2]),
        ints([length, 5, length - 1, 7, length, length, 1, 0, 3]),
    )
    counts = allocate_counts(2, vocab, DEVICE)
    check(logits, rows, seq_lens, tokens, counts, config)
    assert not counts.any()


def test_a_row_does_not_depend_on_the_batch():
    logits, tokens = make(3, 501, 200)
    together = logits.clone()
    rows, seq_lens = ints([4, 1, 4]), ints([200, 150, 77])
    apply_penalties(together, rows, seq_lens, tokens, table(ROWS))
    for i in range(3):
        apply_penalties(logits[i : i + 1], rows[i : i + 1], seq_lens[i : i + 1], tokens, table(ROWS))
    assert torch.equal(logits, together)


def test_excluded_and_unusable_logits_stay_so():
    logits, tokens = make(2, 5, 50)
    logits[0, :4] = torch.tensor([-math.inf, math.nan, math.inf, 0.0])
    apply_penalties(logits, ints([4, 4]), ints([50, 50]), tokens, table(ROWS))
    assert logits[0, 0] == -math.inf
    assert logits[0, 1].isnan()
    assert logits[0, 2] == math.inf
    assert logits[1].isfinite().all()


def test_tokens_past_the_end_are_not_read():
    logits, tokens = make(1, 64, 32)
    tokens[1, 9:] = 0x7FFFFFFF
    check(logits, ints([1]), ints([9]), tokens)


def test_empty_batch_bad_arguments_and_config():
    logits, tokens = make(2, 5, 50)
    apply_penalties(logits[:0], ints([]), ints([]), tokens, table(ROWS))
    with pytest.raises(ValueError, match="fp32"):
        apply_penalties(logits.bfloat16(), ints([0, 0]), ints([1, 1]), tokens, table(ROWS))
    with pytest.raises(ValueError, match="counts"):
        apply_penalties(
            logits, ints([0, 0]), ints([1, 1]), tokens, table(ROWS), torch.zeros(2, 4, dtype=torch.int32)
        )
    assert penalty_config(256, 64, H100).programs == 64
    assert penalty_config(3, 64, H100).programs == 3
