from dataclasses import dataclass

import charonia_kernels as kernels
import pytest
import torch
from charonia_kernels import reference
from support.kernel_checks import DTYPES, assert_close, poison


@dataclass
class Batch:
    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    def attend(self, op=kernels.paged_attention, **options):
        caches = self.key_cache, self.value_cache
        scale = self.q.shape[-1] ** -0.5
        return op(self.q, *caches, self.block_table, self.seq_lens, self.query_start_loc, scale, **options)


def make(
    sequences, *, heads=4, kv_heads=2, dim=64, block=16, dtype=torch.float32, padding=0, window=None, seed=0
):
    """A batch of (queries, keys) sequences in scattered blocks; every slot that none of them may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-keys // block) for _, keys in sequences]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    caches = torch.full((2, sum(counts) + 1, kv_heads, block, dim), float("nan"), dtype=dtype)
    table = torch.zeros(len(sequences), max([*counts, 1]) + 1, dtype=torch.int32)
    for row, (queries, keys) in enumerate(sequences):
        first_visible = 0 if window is None else max(0, keys - queries - window + 1)
        for index in range(counts[row]):
            table[row, index] = number = order.pop()
            low, high = max(0, first_visible - index * block), min(block, keys - index * block)
            if low < high:
                shape = (2, kv_heads, high - low, dim)
                caches[:, number, :, low:high] = torch.randn(shape, generator=generator).to(dtype)
    starts = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]) + padding, heads, dim, generator=generator).to(dtype)
    lengths = torch.tensor([keys for _, keys in sequences], dtype=torch.int32)
    return Batch(q, caches[0], caches[1], table, lengths, starts)


def check(batch, magnitude=1.0, **options):
    wide = Batch(
        batch.q.double(),
        batch.key_cache,
        batch.value_cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
    )
    expected = wide.attend(reference.paged_attention, **options)
    poison(batch.q)
    actual = batch.attend(**options)
    assert actual.dtype == batch.q.dtype
    assert_close(actual, expected, depth=batch.q.shape[-1], scale=magnitude)


MIXED = [(1, 5), (1, 1), (3, 3), (17, 40), (0, 9), (1, 33), (50, 50), (1, 700), (70, 300), (1, 1100)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(2, 2, 64), (9, 3, 64), (4, 1, 80), (8, 1, 96), (8, 2, 128), (2, 1, 256), (10, 2, 8)],
)
def test_decodes_and_prefills_together(heads, kv_heads, dim, dtype):
    check(make(MIXED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype))


@pytest.mark.parametrize("block", [1, 8, 16, 24, 128])
def test_block_sizes(block):
    check(make(MIXED, heads=6, kv_heads=2, block=block))


@pytest.mark.parametrize("window", [1, 2, 15, 64, 100, 511, 513, 5000])
def test_sliding_window_never_reads_behind_itself(window):
    check(make(MIXED, heads=4, kv_heads=2, window=window), sliding_window=window)


@pytest.mark.parametrize("soft_cap", [0.5, 5.0, 50.0])
def test_soft_cap(soft_cap):
    check(make(MIXED, heads=4, kv_heads=2), soft_cap=soft_cap)


def test_window_and_cap_together():
    check(make(MIXED, heads=4, kv_heads=2, window=30), sliding_window=30, soft_cap=10.0)


def test_a_head_size_that_is_no_multiple_of_the_vector_width():
    check(make([(1, 20), (9, 30)], dim=20))


def test_many_queries_for_few_keys_heads_in_one_group():
    check(make([(5, 9), (1, 77)], heads=64, kv_heads=1, dim=64))


def test_rows_without_keys_and_padding_rows_are_zero():
    batch = make([(1, 0), (2, 30), (3, 1)], padding=3)
    actual = batch.attend()
    assert not actual[0].any(), "no keys"
    assert actual[1:3].any(dim=-1).all()
    assert not actual[3:5].any(), "queries before the first key"
    assert actual[5].any(dim=-1).all()
    assert not actual[6:].any(), "padding"
    check(batch)


def test_nothing_to_do():
    assert make([]).attend().shape == (0, 4, 64)
    assert make([(0, 7), (0, 0)]).attend().shape == (0, 4, 64)
    assert not make([], padding=2).attend().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_that_share_blocks(dtype):
    batch = make([(1, 48), (4, 64)], dtype=dtype)
    batch.block_table[1, :2] = batch.block_table[0, :2]
    check(batch)


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("chunk", [1, 3, 16, 61])
def test_chunked_equals_whole(chunk, window):
    whole = make([(150, 700)], heads=6, kv_heads=2)
    expected = whole.attend(sliding_window=window)
    for start in range(0, 150, chunk):
        count = min(chunk, 150 - start)
        part = Batch(
            whole.q[start : start + count],
            whole.key_cache,
            whole.value_cache,
            whole.block_table,
            torch.tensor([550 + start + count], dtype=torch.int32),
            torch.tensor([0, count], dtype=torch.int32),
        )
        actual = part.attend(sliding_window=window)
        torch.testing.assert_close(actual, expected[start : start + count], rtol=1e-5, atol=2e-6)


def test_a_decode_does_not_depend_on_its_batch():
    batch = make([(1, 1300), (1, 20), (30, 600), (1, 513)])
    together = batch.attend()
    for row, token in ((0, 0), (1, 1), (3, 32)):
        alone = Batch(
            batch.q[token : token + 1],
            batch.key_cache,
            batch.value_cache,
            batch.block_table[row : row + 1],
            batch.seq_lens[row : row + 1],
            torch.tensor([0, 1], dtype=torch.int32),
        )
        assert torch.equal(alone.attend()[0], together[token]), row


def test_scores_that_overflow_exp_stay_finite():
    batch = make([(1, 40), (7, 90)])
    batch.q.mul_(300.0)
    check(batch, magnitude=300.0)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_caches_of_another_dtype(dtype, cache_dtype):
    batch = make([(1, 40), (7, 90)], dtype=cache_dtype)
    batch.q = batch.q.to(dtype)
    check(batch)


def test_layers_of_a_larger_cache_and_queries_of_a_wider_projection():
    batch = make([(1, 40), (7, 90)])
    expected = batch.attend()
    caches = torch.full((len(batch.key_cache), 2, *batch.key_cache.shape[1:]), float("nan"))
    caches[:, 0], caches[:, 1] = batch.key_cache, batch.value_cache
    batch.key_cache, batch.value_cache = caches[:, 0], caches[:, 1]
    batch.q = torch.cat([batch.q, batch.q], dim=1)[:, :4]
    assert torch.equal(batch.attend(), expected)


@pytest.mark.parametrize("field", ["block_table", "seq_lens", "query_start_loc"])
def test_index_tensors_of_another_width_are_refused(field):
    batch = make([(1, 40), (7, 90)])
    setattr(batch, field, getattr(batch, field).long())
    with pytest.raises(ValueError, match=rf"{field} \[\d+(, \d+)?\] torch.int64"):
        batch.attend()


def test_caches_with_gaps_inside_blocks_are_refused():
    batch = make([(1, 40), (7, 90)])
    wide = torch.cat([batch.key_cache, batch.key_cache], dim=-1)
    batch.key_cache = batch.value_cache = wide[..., :64]
    with pytest.raises(ValueError, match="each block contiguous"):
        batch.attend()
