"""Work lists, decode attention, shared prefixes and the launch function against plain Python and the fp64 oracle."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from charonia_kernels.gpu._launch import H100, DeviceTraits
from charonia_kernels.gpu.attention_decode import decode_config, decode_variant
from charonia_kernels.gpu.attention_decode_hopper import HopperDecodeConfig, hopper_decode_config
from charonia_kernels.gpu.attention_plan import (
    AttentionPlan,
    SplitConfig,
    build_plan,
    shared_chunks,
    split_config,
)
from charonia_kernels.gpu.paged_attention import paged_attention
from charonia_kernels.reference import paged_attention as oracle
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close

FP8 = torch.float8_e4m3fn
# Weights are rounded to the queries' dtype before they meet the values: half a unit in the last place of a weight,
# times the values, in units of 2**-24.
DEPTH = {torch.float32: 256, torch.float16: 2**13, torch.bfloat16: 2**16}
A100 = DeviceTraits((8, 0), 108, 166_912)


@dataclass(frozen=True)
class Batch:
    """sequences: (query tokens, keys) of each entry. shared: keys that are in the same blocks for all decodes."""

    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    max_query: int = 1
    shared: int = 0
    split: SplitConfig = SplitConfig(6, 32, 32, 32)  # noqa: RUF009, frozen
    padding: int = 0
    seed: int = 0


class Problem:
    """Tensors of a batch. Slots that no query sees are NaN, in blocks of somebody and of nobody; so are surplus
    query tokens. Table rows are not the entries' numbers, and their unused entries name the null block."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        generator = torch.Generator().manual_seed(batch.seed)
        size, shared_blocks = batch.block_size, batch.shared // batch.block_size
        counts = [-(-keys // size) for _, keys in batch.sequences]
        order = (torch.randperm(sum(counts) + shared_blocks + 1, generator=generator) + 1).tolist()
        shape = (len(order) + 1, batch.num_kv_heads, size, batch.head_dim)
        caches = torch.full((2, *shape), float("nan"))
        table = torch.zeros(len(counts) + 3, max([*counts, 1]) + 2, dtype=torch.int32)
        self.rows = torch.randperm(len(table), generator=generator)[: len(counts)].int()
        common = [order.pop() for _ in range(shared_blocks)]
        for index, (queries, keys) in enumerate(batch.sequences):
            visible = 0 if batch.window is None else max(0, keys - queries - batch.window + 1)
            decode = 0 < queries <= batch.max_query
            for block in range(counts[index]):
                low, high = max(0, visible - block * size), min(size, keys - block * size)
                number = common[block] if decode and block < shared_blocks else order.pop()
                table[self.rows[index], block] = number
                if low < high:
                    part = caches[:, number, :, low:high]
                    part.copy_(torch.where(part.isnan(), torch.randn(part.shape, generator=generator), part))
        cache_dtype = batch.cache_dtype or batch.dtype
        self.k_scale = self.v_scale = None
        if cache_dtype == FP8:
            self.k_scale, self.v_scale = torch.tensor([0.5]), torch.tensor([0.25])
            caches = caches / torch.tensor([0.5, 0.25]).view(2, 1, 1, 1, 1)
        self.key_cache, self.value_cache = caches.to(cache_dtype).unbind(0)
        lengths = [queries for queries, _ in batch.sequences]
        self.starts = torch.tensor([0, *lengths]).cumsum(0).int()
        self.seq_lens = torch.tensor([keys for _, keys in batch.sequences], dtype=torch.int32)
        tokens = int(self.starts[-1])
        wide = torch.randn(tokens + batch.padding, batch.num_heads + 2, batch.head_dim, generator=generator)
        wide[tokens:] = float("nan")
        self.q = wide.to(batch.dtype)[:, : batch.num_heads]
        self.table = table
        self.scale = batch.head_dim**-0.5

    def expected(self) -> torch.Tensor:
        return oracle(
            self.q.double(), self.key_cache, self.value_cache, self.table, self.seq_lens, self.starts, self.scale,
            self.batch.window, self.batch.soft_cap, self.rows, self.k_scale, self.v_scale,
        )  # fmt: skip

    def plan(self, **changes: object) -> AttentionPlan:
        batch = self.batch
        largest = AttentionPlan.allocate(
            len(batch.sequences) + 2, len(self.q) + 5, batch.num_heads, batch.num_kv_heads, batch.head_dim,
            batch.block_size, DEVICE, batch.max_query, bool(batch.shared), batch.split,
        )  # fmt: skip
        kinds = [queries <= batch.max_query for queries, _ in batch.sequences if queries]
        has = {"has_decodes": any(kinds), "has_prefills": not all(kinds), "has_cascade": bool(batch.shared)}
        return largest.sized(len(batch.sequences), len(self.q), **(has | changes))

    def attend(self, plan: AttentionPlan | None = None, prefix: int | None = None) -> torch.Tensor:
        plan = plan or self.plan()
        move = DEVICE.type
        common = torch.tensor([self.batch.shared if prefix is None else prefix], dtype=torch.int32).to(move)
        build_plan(plan, self.starts.to(move), self.seq_lens.to(move), self.rows.to(move), common)
        wide = torch.zeros(len(self.q), self.batch.num_heads + 2, self.batch.head_dim, dtype=self.q.dtype).to(
            move
        )
        wide[:, : self.batch.num_heads] = self.q.to(move)
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype).to(move)
        options = (
            {}
            if self.k_scale is None
            else {"k_scale": self.k_scale.to(move), "v_scale": self.v_scale.to(move)}
        )
        actual = paged_attention(
            wide[:, : self.batch.num_heads], self.key_cache.to(move), self.value_cache.to(move), self.table.to(move),
            plan, self.scale, self.batch.window, self.batch.soft_cap, out=out, **options,
        )  # fmt: skip
        assert actual is out
        assert not plan.workspace.counters.any(), "counters are left as they were found"
        return actual.cpu()


def check(batch: Batch) -> torch.Tensor:
    problem = Problem(batch)
    actual, expected = problem.attend(), problem.expected()
    used = int(problem.starts[-1])
    assert actual[used:].isnan().all(), "rows of nobody are not written"
    assert_close(actual[:used], expected[:used], depth=DEPTH[batch.dtype], scale=4.0)
    return actual


MIXED = ((1, 5), (0, 9), (1, 33), (5, 40), (1, 300), (1, 64))
DECODES = ((1, 5), (0, 9), (1, 33), (1, 170), (1, 64))
SPLIT = ((1, 150), (1, 7), (1, 32))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 2), (5, 1), (14, 2), (16, 1)])
def test_groups(heads, kv_heads):
    check(Batch(DECODES, num_heads=heads, num_kv_heads=kv_heads))


def test_decodes_and_prefills_together():
    check(Batch(MIXED, padding=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype):
    check(Batch(SPLIT, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes(block_size):
    check(Batch(DECODES, block_size=block_size, split=SplitConfig(6, block_size, block_size, 32)))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_caches(dtype, block_size):
    split = SplitConfig(4, 64, 64, 32)
    check(Batch(SPLIT, dtype=dtype, cache_dtype=FP8, block_size=block_size, split=split))


@pytest.mark.parametrize("window", [1, 15, 64, 5000])
def test_windows_never_reach_behind_themselves(window):
    check(Batch(((1, 150), (1, 5), (2, 70), (1, 64)), window=window, max_query=2))


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap):
    check(Batch(SPLIT, soft_cap=soft_cap))


@pytest.mark.parametrize("max_query", [2, 3, 4])
def test_verification_of_several_tokens(max_query):
    sequences = ((max_query, 70), (1, 90), (2, 2), (max_query + 1, 30), (max_query, 97), (1, 1))
    check(Batch(sequences, num_heads=6, max_query=max_query))


@pytest.mark.parametrize("target", [1, 3, 30])
def test_one_long_sequence_is_divided(target):
    check(Batch(((1, 330),), split=SplitConfig(target, 16, 16, 32)))


def test_rows_without_keys_are_zero():
    actual = check(Batch(((1, 0), (1, 20), (0, 0)), padding=2))
    assert not actual[0].any()


@pytest.mark.parametrize("sequences", [(), ((0, 7), (0, 0))])
def test_empty_batches(sequences):
    assert Problem(Batch(sequences)).attend().shape == (0, 4, 64)


def test_only_padding_in_a_graph_that_expects_decodes():
    problem = Problem(Batch(((0, 7), (0, 0)), padding=2))
    assert problem.attend(problem.plan(has_decodes=True, has_prefills=True)).isnan().all()


def test_everything_may_be_a_prefill():
    problem = Problem(Batch(((1, 20), (3, 30))))
    actual = problem.attend(problem.plan(has_decodes=False, has_prefills=True))
    assert_close(actual, problem.expected(), depth=256, scale=4.0)


def test_results_are_repeated_to_the_bit():
    problem = Problem(Batch(SPLIT, dtype=torch.bfloat16))
    plan = problem.plan()
    assert torch.equal(problem.attend(plan), problem.attend(plan))


def test_an_undivided_entry_does_not_depend_on_its_batch():
    split = SplitConfig(1, 512, 32, 32)
    together = Problem(Batch(SPLIT, split=split))
    alone = replace(together.batch, sequences=SPLIT[:1])
    single = Problem(alone)
    for name in ("key_cache", "value_cache", "table", "q"):
        setattr(single, name, getattr(together, name))
    single.q, single.rows = together.q[:1], together.rows[:1]
    assert torch.equal(single.attend()[0], together.attend()[0])


CASCADE = ((1, 150), (1, 129), (2, 140), (0, 0), (1, 230))


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("shared", [16, 128])
def test_shared_prefixes(shared, window):
    batch = Batch(CASCADE, num_heads=6, shared=shared, max_query=2, window=window)
    check(batch)


def test_a_shared_prefix_changes_nothing():
    sequences = ((1, 150), (1, 129), (9, 40))
    problem = Problem(Batch(sequences, shared=128, max_query=2, dtype=torch.bfloat16, soft_cap=20.0))
    with_it, without = problem.attend(), problem.attend(prefix=0)
    plain = problem.attend(problem.plan(has_cascade=False))
    assert torch.equal(without, plain)
    assert_close(with_it, plain.double(), depth=2**16, scale=4.0)
    assert not torch.equal(with_it, plain), "the prefix is taken by itself"


def test_of_a_prefix_no_more_is_used_than_lies_before_all_queries():
    problem = Problem(Batch(((1, 49), (1, 48), (1, 70)), shared=32))
    assert_close(problem.attend(prefix=64), problem.expected(), depth=256, scale=4.0)
    assert int(problem.plan().shared_chunks(132)) >= 1


def test_prefix_of_an_fp8_cache():
    check(Batch(((1, 150), (1, 129)), shared=128, dtype=torch.bfloat16, cache_dtype=FP8))


def plan_lists(sequences, split, *, max_query=1, heads=8, kv_heads=2, batch=None):
    """Decode and prefill items of a batch, surplus and all, as lists."""
    count, tokens = len(sequences), sum(queries for queries, _ in sequences)
    largest = AttentionPlan.allocate(
        batch or count, tokens + 9, heads, kv_heads, 64, 16, DEVICE, max_query, False, split
    )
    plan = largest.sized(count, tokens, True, True)
    space = plan.workspace
    for buffer in (space.decode_items, space.prefill_items):
        buffer.fill_(-1)
    starts = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0).int().to(DEVICE)
    lengths = torch.tensor([keys for _, keys in sequences], dtype=torch.int32).to(DEVICE)
    rows = torch.arange(count, dtype=torch.int32).flip(0).contiguous().to(DEVICE)
    build_plan(plan, starts, lengths, rows)
    assert (space.decode_items[plan.decode_slots :] == -1).all()
    assert (space.prefill_items[plan.prefill_slots :] == -1).all()
    decodes = space.decode_items[: plan.decode_slots].tolist()
    prefills = space.prefill_items[: plan.prefill_slots].tolist()
    return plan, starts.tolist(), decodes, prefills


def lognormal(count, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.empty(count).log_normal_(5.5, 1.3, generator=generator).clamp(1, 16000).long()
    queries = torch.randint(0, 3, (count,), generator=generator)
    queries[::7] = torch.randint(1, 90, (len(queries[::7]),), generator=generator)
    return [(int(q), max(int(q), int(k))) for q, k in zip(queries, keys, strict=True)]


@pytest.mark.parametrize(
    ("count", "target", "seed"), [(1, 50, 0), (31, 10, 1), (33, 66, 2), (300, 66, 3), (1024, 9, 4)]
)
def test_work_lists(count, target, seed):
    split = SplitConfig(target, 64, 64, 128)
    sequences = lognormal(count, seed) if count > 1 else [(1, 64_000)]
    plan, starts, decodes, prefills = plan_lists(sequences, split)
    total = sum(keys for queries, keys in sequences if queries == 1)
    chunk = max(64, math.ceil(math.ceil(total / target) / 64) * 64)
    by_entry, order = {}, []
    for index, (entry, row, first, queries, start, end, first_item, number) in enumerate(decodes):
        if number:
            assert (row, first, queries) == (count - 1 - entry, starts[entry], 1)
            assert start % 64 == 0 and end - start <= chunk
            by_entry.setdefault(entry, []).append((start, end))
            assert first_item == index - len(by_entry[entry]) + 1
            order.append((number > 1, end - start))
        else:
            assert not any(decodes[index]), "surplus is zero"
    assert order == sorted(order, key=lambda item: not item[0]), "divided entries first"
    assert sum(divided for divided, _ in order) <= 2 * target
    assert set(by_entry) == {i for i, (queries, _) in enumerate(sequences) if queries == 1}
    for entry, pieces in by_entry.items():
        assert [pieces[0][0], *(end for _, end in pieces)] == [
            *(start for start, _ in pieces),
            sequences[entry][1],
        ]
        assert len({end - start for start, end in pieces[:-1]}) <= 1, "about equal pieces"
    tiles = [item for item in prefills if item[2]]
    assert all(not any(item) for item in prefills[len(tiles) :])
    wanted = []
    for entry, (queries, keys) in enumerate(sequences):
        offsets = range(0, queries, plan.tile_tokens) if queries > 1 else ()
        for offset in reversed(offsets):
            tokens = min(plan.tile_tokens, queries - offset)
            wanted.append([count - 1 - entry, starts[entry] + offset, tokens, keys - queries + offset])
    assert tiles == wanted


def test_lists_of_a_longer_prompt_than_one_program_fills():
    _, _, decodes, prefills = plan_lists([(1, 10), (9000, 9000)], SplitConfig(400, 64, 64, 128))
    assert sum(item[2] for item in prefills) == 9000
    assert [item[3] for item in prefills if item[2]] == sorted((i[3] for i in prefills if i[2]), reverse=True)
    assert sum(item[7] for item in decodes) == 1


def test_sizes_that_were_not_allocated_for_are_refused():
    plan = AttentionPlan.allocate(4, 64, 8, 2, 64, 16, DEVICE)
    with pytest.raises(ValueError, match="5 entries, allocated for 4"):
        plan.sized(5, 5, True, False)
    with pytest.raises(ValueError, match="900 tokens"):
        plan.sized(4, 900, True, True)
    with pytest.raises(ValueError, match="without has_cascade"):
        plan.sized(4, 4, True, False, True)
    with pytest.raises(ValueError, match="max_batch 2000"):
        AttentionPlan.allocate(2000, 64, 8, 2, 64, 16, DEVICE)


def test_arguments_that_do_not_fit_are_refused():
    problem = Problem(Batch(SPLIT))
    plan = problem.plan()
    caches = problem.key_cache.to(DEVICE), problem.value_cache.to(DEVICE)
    q, table = problem.q.to(DEVICE), problem.table.to(DEVICE)
    with pytest.raises(ValueError, match="do not fit the plan"):
        paged_attention(q[:, :2], *caches, table, plan, 1.0)
    with pytest.raises(ValueError, match="does not go with"):
        paged_attention(q.half(), *caches, table, plan, 1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        paged_attention(q, *caches, table, plan, 0.0)
    with pytest.raises(ValueError, match="seq_lens must be contiguous int32"):
        build_plan(
            plan, problem.starts.to(DEVICE), problem.seq_lens.long().to(DEVICE), problem.rows.to(DEVICE)
        )


def test_which_kernel_attends():
    steps = AttentionPlan.allocate(4, 64, 8, 2, 128, 64, DEVICE, has_cascade=True)
    plan = steps.sized(4, 4, True, False, only_newest_key_is_new=True)
    bf16, half = torch.bfloat16, torch.float16

    def variant(
        plan: AttentionPlan = plan,
        kinds: tuple[torch.dtype, torch.dtype] = (bf16, bf16),
        window: int | None = None,
        device: DeviceTraits = H100,
    ) -> str:
        return decode_variant(plan, *kinds, window, device, portable=False)

    assert variant() == "hopper"
    assert variant(kinds=(half, half)) == "hopper"
    assert variant(kinds=(bf16, FP8)) == "portable"
    assert variant(kinds=(torch.float32, torch.float32)) == "portable"
    assert variant(window=128) == "portable"
    assert variant(replace(plan, batch=256)) == "portable", "bandwidth is all that counts"
    assert variant(device=A100) == "portable"
    assert variant(device=replace(H100, capability=(10, 0))) == "portable"
    assert variant(steps.sized(4, 4, True, False)) == "portable", (
        "an entry may see keys that another writes now"
    )
    assert variant(steps.sized(4, 9, True, True, False, True)) == "portable"
    assert variant(steps.sized(4, 4, True, False, True, True)) == "portable", "of a shared prefix"
    for changes in ({"block_size": 32}, {"max_decode_query_len": 2}, {"num_heads": 64}, {"head_dim": 512}):
        assert variant(replace(plan, **changes)) == "portable", changes
    assert decode_variant(plan, bf16, bf16, None, H100, portable=True) == "portable"


def test_a_plan_of_the_largest_step_promises_nothing_about_keys():
    plan = AttentionPlan.allocate(4, 64, 8, 2, 128, 64, DEVICE)
    assert not plan.only_newest_key_is_new
    assert not plan.sized(4, 9, True, True, only_newest_key_is_new=True).only_newest_key_is_new


def test_rings_of_the_hopper_kernel_let_programs_share_a_multiprocessor():
    for batch, rows, head_dim in itertools.product((1, 8, 9, 128), (1, 4, 16), (64, 96, 128, 256)):
        config = hopper_decode_config(batch, rows, head_dim)
        assert config.shared_bytes(head_dim) <= 65_536
        assert config.early
    assert HopperDecodeConfig(128, 1, 2).shared_bytes(96) == 3 * 128 * 128 * 2


def test_heuristics():
    assert split_config(8, 64, H100).target_items == 66
    assert split_config(8, 128, H100).align == 128
    for rows, head_dim, itemsize in ((1, 64, 2), (4, 128, 2), (128, 256, 4), (16, 128, 1)):
        for device in (H100, A100):
            config = decode_config(rows, head_dim, 64, itemsize, device)
            assert 16 <= config.tile <= 128
            taken = (config.num_stages - 1) * config.tile * 2 * head_dim * itemsize
            assert taken <= device.max_shared_bytes // 2, (rows, head_dim, itemsize)
    split = split_config(8, 64, H100)
    assert shared_chunks(0, 4, 8, split, 132) == 1
    assert shared_chunks(256, 4, 8, split, 132) == 2
    assert shared_chunks(1, 4, 8, split, 132) == 16
