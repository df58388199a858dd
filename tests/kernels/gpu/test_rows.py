import pytest
import torch
from charonia_kernels.gpu import rows as gpu
from charonia_kernels.gpu._launch import H100, INTERPRETED
from charonia_kernels.reference import rows as reference
from support.gpu_kernels import DEVICE

BLOCK_SIZE = 16
UNWRITTEN = -7
OPS = [pytest.param(gpu, id="gpu"), pytest.param(reference, id="reference")]


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def unwritten(count):
    return torch.full((count,), UNWRITTEN, dtype=torch.int32, device=DEVICE)


def state(num_rows=6, max_tokens=70, seed=0):
    """(num_computed, token_ids, block_table): views of one arena, at odd places, with distinct contents."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-max_tokens // BLOCK_SIZE)
    arena = torch.randint(1, 10**6, (3 + num_rows * (1 + max_tokens + blocks),), generator=generator)
    arena = arena.to(torch.int32).to(DEVICE)
    num_computed, token_ids, block_table = arena[3:].split(
        [num_rows, num_rows * max_tokens, num_rows * blocks]
    )
    return num_computed, token_ids.view(num_rows, -1), block_table.view(num_rows, -1)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(
    "segments",
    [
        [],
        [(5, 1)],
        [(0, 3), (10, 0), (3, 1)],
        [(17, 2500), (5000, 1024), (4, 7)],
        [(i * 3, 2) for i in range(40)],
    ],
)
def test_apply_writes(ops, segments):
    arena = torch.arange(7000, dtype=torch.int32, device=DEVICE)
    expected, records, payload = arena.clone(), [], []
    for dest, length in segments:
        source = 3 * len(segments) + len(payload)
        records += [dest, source, length]
        payload += [-1 - source - i for i in range(length)]
        expected[dest : dest + length] = ints(payload[len(payload) - length :])
    staged = ints(records + payload + [99] * 5)
    ops.apply_writes(arena, staged, len(segments))
    assert torch.equal(arena, expected)


def test_segments_may_share_a_source_and_a_long_one_is_split():
    arena = torch.zeros(20_000, dtype=torch.int32, device=DEVICE)
    staged = ints([1, 6, 9000, 10_500, 6, 9000, *range(9000)])
    assert gpu.write_config(2, 9000, H100).splits == 9
    gpu.apply_writes(arena, staged, 2)
    assert torch.equal(arena[1:9001], staged[6:])
    assert torch.equal(arena[10_500:19_500], staged[6:])
    assert int(arena.count_nonzero()) == 2 * 8999


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(
    ("lengths", "padded_entries", "padded_tokens"),
    [
        ([], 0, 0),
        ([], 0, 3),
        ([], 2, 0),
        ([], 2, 5),
        ([1], 1, 1),
        ([1, 1, 1], 3, 3),
        ([1, 1, 1], 5, 8),
        ([30], 1, 30),
        ([1, 40, 2, 1], 4, 44),
        ([1, 40, 2, 1], 9, 150),
        ([3, 0, 2], 3, 6),
        ([2], 140, 2),
    ],
)
def test_prepare_step(ops, lengths, padded_entries, padded_tokens):
    num_computed, token_ids, block_table = state()
    num_computed[:] = ints([0, 15, 29, 3, 16, 7])
    before = num_computed.clone(), token_ids.clone(), block_table.clone()
    padding = padded_entries - len(lengths)
    chosen = [4, 2, 5, 0][: len(lengths)]
    rows = ints(chosen + [2**30] * padding)
    starts = torch.tensor([0, *lengths, *[0] * padding]).cumsum(0).to(torch.int32).to(DEVICE)
    outs = [unwritten(padded_tokens) for _ in range(3)]
    seq_lens = unwritten(padded_entries)
    ops.prepare_step(rows, starts, num_computed, token_ids, block_table, BLOCK_SIZE, *outs, seq_lens)

    expected = []
    for row, length in zip(chosen, lengths, strict=True):
        first = int(num_computed[row])
        for position in range(first, first + length):
            slot = int(block_table[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
            expected.append((int(token_ids[row, position]), position, slot))
    expected += [(0, 0, 0)] * (padded_tokens - len(expected))
    assert list(zip(*(out.tolist() for out in outs), strict=True)) == expected
    totals = [
        int(num_computed[row]) + length if length else 0 for row, length in zip(chosen, lengths, strict=True)
    ]
    assert seq_lens.tolist() == totals + [0] * padding
    for tensor, old in zip((num_computed, token_ids, block_table), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("ops", OPS)
def test_positions_past_the_row_go_to_the_null_block(ops):
    num_computed, token_ids, block_table = state(max_tokens=64)
    num_computed[1] = 63
    outs, seq_lens = [unwritten(2) for _ in range(3)], unwritten(1)
    ops.prepare_step(
        ints([1]), ints([0, 2]), num_computed, token_ids, block_table, BLOCK_SIZE, *outs, seq_lens
    )
    last = [int(token_ids[1, 63]), 63, int(block_table[1, 3]) * BLOCK_SIZE + 15]
    assert [out.tolist() for out in outs] == [[last[0], 0], [63, 64], [last[2], 0]]
    assert seq_lens.tolist() == [65]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_append_tokens(ops, token_dtype):
    num_computed, token_ids, _ = state()
    expected_computed, expected_ids = num_computed.clone(), token_ids.clone()
    # Entries: samples; does not sample; its row is full; has no tokens; padding.
    rows, starts = ints([4, 2, 5, 1, 2**30]), ints([0, 1, 3, 4, 4, 4])
    seq_lens, samples = ints([10, 20, 70, 0, 0]), ints([1, 0, 1, 1, 1])
    tokens = torch.tensor([111, 222, 333, 444, 555], dtype=token_dtype, device=DEVICE)
    expected_computed[[4, 2, 5]] = ints([10, 20, 70])
    expected_ids[4, 10] = 111
    ops.append_tokens(rows, starts, seq_lens, samples, tokens, num_computed, token_ids)
    assert torch.equal(num_computed, expected_computed)
    assert torch.equal(token_ids, expected_ids)


@pytest.mark.parametrize("ops", OPS)
def test_append_to_many_rows_and_to_none(ops):
    num_computed, token_ids, _ = state(num_rows=150, max_tokens=20)
    expected = token_ids.clone()
    rows = torch.arange(149, -1, -1, dtype=torch.int32, device=DEVICE)
    seq_lens = rows % 19
    tokens = rows + 1000
    expected[rows.long(), seq_lens.long()] = tokens
    starts = torch.arange(151, dtype=torch.int32, device=DEVICE)
    ops.append_tokens(rows, starts, seq_lens, torch.ones_like(rows), tokens, num_computed, token_ids)
    assert torch.equal(token_ids, expected)
    assert torch.equal(num_computed[rows.long()], seq_lens)
    none = ints([])
    ops.append_tokens(none, ints([0]), none, none, none, num_computed, token_ids)
    assert torch.equal(token_ids, expected)


@pytest.mark.parametrize("ops", OPS)
def test_steps_follow_each_other(ops):
    """A prompt of 5 in chunks of 3 and 2, then two sampled tokens."""
    num_computed, token_ids, block_table = state()
    num_computed.zero_()
    prompt = token_ids[3, :5].tolist()
    seen = []
    for length, sample, token in ((3, 0, 0), (2, 1, 901), (1, 1, 902), (1, 1, 903)):
        outs, seq_lens = [unwritten(length) for _ in range(3)], unwritten(1)
        rows, starts = ints([3]), ints([0, length])
        ops.prepare_step(rows, starts, num_computed, token_ids, block_table, BLOCK_SIZE, *outs, seq_lens)
        ops.append_tokens(rows, starts, seq_lens, ints([sample]), ints([token]), num_computed, token_ids)
        seen += outs[0].tolist()
    assert seen == [*prompt, 901, 902]
    assert token_ids[3, :8].tolist() == [*prompt, 901, 902, 903]
    assert num_computed.tolist() == [0, 0, 0, 7, 0, 0]


def test_launch_parameters():
    assert gpu.write_config(1, 131_072, H100).splits == 128
    assert gpu.write_config(256, 600, H100).splits == 1
    assert gpu.write_config(256, 131_072, H100).splits == 2
    assert gpu.write_config(1000, 131_072, H100).splits == 1
    assert gpu.write_config(1, 0, H100).splits == 1


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_counts_and_places_do_not_recompile():
    num_computed, token_ids, block_table = state()
    num_computed.zero_()

    def step(entries, padded_tokens, shift):
        outs = [unwritten(padded_tokens + shift)[shift:] for _ in range(3)]
        rows, starts = torch.zeros_like(unwritten(entries)), torch.zeros_like(unwritten(entries + 1))
        starts[1:], seq_lens = 1, unwritten(entries)
        gpu.prepare_step(rows, starts, num_computed, token_ids, block_table, BLOCK_SIZE, *outs, seq_lens)
        gpu.append_tokens(rows, starts, seq_lens, seq_lens, seq_lens, num_computed, token_ids)
        gpu.apply_writes(num_computed, torch.zeros_like(unwritten(3 * entries + padded_tokens)), entries)

    def compiled():
        kernels = (gpu.prepare_step_kernel, gpu.append_tokens_kernel, gpu.apply_writes_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    step(3, 7, 0)
    before = compiled()
    for entries, padded_tokens, shift in ((1, 1, 1), (16, 16, 2), (32, 4096, 4), (17, 33, 3)):
        step(entries, padded_tokens, shift)
    assert compiled() == before


def test_misfits_are_refused():
    num_computed, token_ids, block_table = state()
    with pytest.raises(ValueError, match=r"2 records do not fit staged \[5\]"):
        gpu.apply_writes(num_computed, ints([0] * 5), 2)
    with pytest.raises(ValueError, match=r"prepare_step: lengths .* \[2, 2, 2\]"):
        gpu.prepare_step(
            ints([0, 1]),
            ints([0, 1]),
            num_computed,
            token_ids,
            block_table,
            16,
            *[ints([0])] * 3,
            ints([0, 0]),
        )
    with pytest.raises(ValueError, match="differ in length: 1, 2, 1"):
        gpu.prepare_step(
            ints([0]),
            ints([0, 1]),
            num_computed,
            token_ids,
            block_table,
            16,
            ints([0]),
            ints([0, 0]),
            *[ints([0])] * 2,
        )
    with pytest.raises(ValueError, match="append_tokens: lengths"):
        gpu.append_tokens(
            ints([0]), ints([0, 1]), ints([1]), ints([1, 1]), ints([1]), num_computed, token_ids
        )
