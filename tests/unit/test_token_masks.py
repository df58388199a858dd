"""Token masks on their way to either sampler: both exclude the same tokens."""

import math

import numpy as np
import pytest
import torch
from charonia.core.step import TokenMasks
from charonia.worker.token_masks import MaskRecords, allowed_tokens
from charonia_kernels.reference.logit_rules import apply_logit_rules
from charonia_kernels.sampling_params import NUM_PARAMS


def masks_of(rows: list[int], words_per_row: int, seed: int = 0) -> tuple[TokenMasks, np.ndarray]:
    bits = np.random.default_rng(seed).integers(0, 2, (len(rows), 32 * words_per_row), dtype=np.uint8)
    words = np.packbits(bits, axis=1, bitorder="little")
    return TokenMasks(rows, memoryview(words.tobytes()), words_per_row), bits.astype(bool)


@pytest.mark.parametrize("vocab", [96, 100, 128])
@pytest.mark.parametrize("words_per_row", [3, 4, 6])
def test_both_ways_exclude_the_same(vocab: int, words_per_row: int) -> None:
    """Masks may be narrower than the logits, in which case the rest is excluded, or wider."""
    masks, bits = masks_of([7, 2, 5], words_per_row)
    wanted = np.zeros((3, vocab), bool)
    covered = min(vocab, 32 * words_per_row)
    wanted[:, :covered] = bits[:, :covered]
    allowed = allowed_tokens(masks, vocab)
    assert {row: mask.tolist() for row, mask in allowed.items()} == dict(
        zip([7, 2, 5], wanted.tolist(), strict=True)
    )
    entries = np.array([2, 9, 5, 7], np.int32)
    records = MaskRecords.send(masks, entries, vocab, torch.device("cpu"))
    assert records is not None
    logits = torch.zeros(4, vocab)
    apply_logit_rules(
        logits, torch.from_numpy(entries), torch.ones(4, dtype=torch.int32), torch.zeros(10, 4, dtype=torch.int32),
        torch.zeros(10, NUM_PARAMS, dtype=torch.int32), records.records, records.words,
    )  # fmt: skip
    for entry, row in ((0, 2), (2, 5), (3, 7)):
        assert (logits[entry] == 0.0).tolist() == allowed[row].tolist()
        assert set(logits[entry].tolist()) <= {0.0, -math.inf}
    assert (logits[1] == 0.0).all()


def test_no_rows() -> None:
    empty = TokenMasks([], memoryview(b""), 0)
    assert allowed_tokens(empty, 40) == {}
    assert MaskRecords.send(empty, np.array([1], np.int32), 40, torch.device("cpu")) is None
