import math

import pytest
import torch
from charonia_kernels.gpu.logprobs import logprobs
from charonia_kernels.reference.logprobs import logprobs as reference
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close, poison


def make(count, vocab, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(count, vocab, generator=generator) * 5).to(dtype)
    tokens = torch.randint(0, vocab, (count,), generator=generator)
    return logits.to(DEVICE), tokens.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "vocab", "k"), [(0, 50, 3), (1, 1, 5), (3, 77, 0), (4, 9001, 20)])
def test_logprobs(count, vocab, k, dtype):
    logits, tokens = make(count, vocab, dtype)
    poison(torch.empty(count), torch.empty(count, 9), torch.empty(2, count))
    result = logprobs(logits, tokens.int(), k)
    expected = reference(logits.double(), tokens, k)
    own, rank, top_values = expected.own, expected.rank, expected.top_values
    assert_close(result.own, own, depth=16, scale=8.0)
    assert torch.equal(result.rank, rank)
    assert result.top_ids.dtype == torch.int32
    assert_close(result.top_values, top_values, depth=16, scale=8.0)
    of_ids = logits.double().log_softmax(dim=-1).gather(-1, result.top_ids.long())
    assert_close(result.top_values, of_ids, depth=16, scale=8.0)


def test_a_row_does_not_depend_on_the_batch():
    logits, tokens = make(4, 5001)
    together = logprobs(logits, tokens, 3)
    for i in range(4):
        alone = logprobs(logits[i : i + 1], tokens[i : i + 1], 3)
        assert torch.equal(alone.own[0], together.own[i])
        assert torch.equal(alone.top_values[0], together.top_values[i])


def test_excluded_tokens_and_ties():
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[0, 1] = -math.inf
    logits[1] = -math.inf
    logits[1, 5] = -3.0
    result = logprobs(logits, torch.tensor([1, 5, 2], device=DEVICE), 2)
    assert result.own.tolist()[:2] == [-math.inf, 0.0]
    assert result.rank.tolist() == [6, 1, 1]
    assert result.own[2] == pytest.approx(-math.log(6), abs=1e-6)
    assert result.top_values[1].tolist() == [0.0, -math.inf]


def test_bad_arguments():
    logits, tokens = make(2, 8)
    with pytest.raises(ValueError, match="tokens"):
        logprobs(logits, tokens[:1], 1)
