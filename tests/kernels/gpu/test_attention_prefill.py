"""Attention of prompt tiles over the paged cache against the fp64 oracle."""

from dataclasses import dataclass, replace

import pytest
import torch
from charonia_kernels.gpu._launch import H100, INTERPRETED, DeviceTraits, traits
from charonia_kernels.gpu.attention_prefill import (
    HEAD_DIMS,
    ITEM_ROWS,
    PrefillConfig,
    prefill_attention,
    prefill_config,
    prefill_tile_tokens,
)
from charonia_kernels.reference.paged_attention import paged_attention
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close

FP8 = torch.float8_e4m3fn
# Weights are rounded to the queries' dtype before they meet the values: half a unit in the last place of a weight,
# times the values, in units of 2**-24. fp32 goes through three tf32 products.
DEPTH = {torch.float32: 64, torch.float16: 2**13, torch.bfloat16: 2**16}


@dataclass(frozen=True)
class Case:
    """sequences: (query tokens, keys) of each. Table rows are the sequences' numbers in reverse, one row unused."""

    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Problem:
    q: torch.Tensor  # [T, num_heads, head_dim], a slice of a wider matrix
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    items: torch.Tensor
    expected: torch.Tensor  # fp64
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    scale: float


def build(case: Case, *, surplus: int = 2, seed: int = 0) -> Problem:
    """A problem in which every slot that no query may see holds NaN: key slots past the end, behind the window, and
    blocks of nobody. Only the null block, which surplus entries of the table name, is filled."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(case.sequences) + 1
    blocks = [-(-keys // case.block_size) for _, keys in case.sequences]
    num_blocks = 2 + sum(blocks)
    shape = (num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
    cache_dtype = case.cache_dtype or case.dtype
    key_cache, value_cache = (torch.full(shape, float("nan")) for _ in range(2))
    key_cache[0], value_cache[0] = float("nan"), float("nan")
    table = torch.zeros(rows, max(blocks, default=0) + 1, dtype=torch.int32)
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    for index, (queries, keys) in enumerate(case.sequences):
        first = 0 if case.window is None else max(0, keys - queries - case.window + 1)
        for block in range(blocks[index]):
            low, high = block * case.block_size, min((block + 1) * case.block_size, keys)
            if high <= first:
                continue  # freed behind the window: the entry names the null block
            number = order.pop()
            table[rows - 1 - index, block] = number
            seen = slice(max(first - low, 0), high - low)
            for cache in (key_cache, value_cache):
                part = cache[number, :, seen]
                part.copy_(torch.randn(part.shape, generator=generator))
    k_scale = v_scale = None
    if cache_dtype == FP8:
        k_scale, v_scale = torch.tensor([0.5]), torch.tensor([1.5])
    key_cache, value_cache = key_cache.to(cache_dtype), value_cache.to(cache_dtype)
    tokens = sum(queries for queries, _ in case.sequences)
    wide = torch.randn(tokens, case.num_heads + 3, case.head_dim, generator=generator)
    q = wide.to(case.dtype)[:, : case.num_heads]
    scale = case.head_dim**-0.5
    starts = torch.tensor([0, *(n for n, _ in case.sequences)]).cumsum(0).to(torch.int32)
    expected = paged_attention(
        q.double(),
        key_cache.double() * (1.0 if k_scale is None else k_scale.double()),
        value_cache.double() * (1.0 if v_scale is None else v_scale.double()),
        table.flip(0)[: rows - 1],
        torch.tensor([keys for _, keys in case.sequences], dtype=torch.int32),
        starts,
        scale,
        case.window,
        case.soft_cap,
    )
    items = build_items(case, surplus)
    moved = (
        None if t is None else t.to(DEVICE)
        for t in (q, key_cache, value_cache, table, items, expected, k_scale, v_scale)
    )
    q, key_cache, value_cache, table, items, expected, k_scale, v_scale = moved
    return Problem(q, key_cache, value_cache, table, items, expected, k_scale, v_scale, scale)


def build_items(case: Case, surplus: int) -> torch.Tensor:
    """Tiles of each sequence, the heaviest first, with `surplus` empty entries."""
    tile = prefill_tile_tokens(case.num_heads, case.num_kv_heads, case.head_dim)
    items, first = [], 0
    for index, (queries, keys) in enumerate(case.sequences):
        begins = range(0, queries, tile)
        items += [
            (len(case.sequences) - index, first + b, min(tile, queries - b), keys - queries + b)
            for b in reversed(begins)
        ]
        first += queries
    return torch.tensor([*items, *[(0, 0, 0, 0)] * surplus], dtype=torch.int32).view(-1, 4)


def attend(case: Case, problem: Problem, config: PrefillConfig | None = None) -> torch.Tensor:
    wide = torch.full((problem.q.shape[0], case.num_heads + 1, case.head_dim), float("nan"), dtype=case.dtype)
    out = wide.to(DEVICE)[:, : case.num_heads]
    prefill_attention(
        problem.q, problem.key_cache, problem.value_cache, problem.block_table, problem.items, out, problem.scale,
        case.window, case.soft_cap, problem.k_scale, problem.v_scale, config=config,
    )  # fmt: skip
    return out


def check(case: Case, config: PrefillConfig | None = None) -> None:
    problem = build(case)
    out = attend(case, problem, config)
    assert_close(out, problem.expected, depth=DEPTH[case.dtype], scale=4.0)


def portable(block_n: int, **fields: int) -> PrefillConfig:
    return replace(PrefillConfig("portable", 128, block_n, 8, 2), **fields)


CASES = {
    "one token": Case(((1, 1),)),
    "prompt": Case(((150, 150),), dtype=torch.bfloat16),
    "chunk": Case(((37, 170),)),
    "ragged batch": Case(((5, 5), (70, 90), (1, 40), (64, 64))),
    "empty sequence": Case(((3, 9), (0, 0), (2, 30))),
    "g1": Case(((140, 150),), num_heads=2),
    "g3": Case(((45, 60),), num_heads=6),
    "g7": Case(((20, 130),), num_heads=7, num_kv_heads=1, dtype=torch.bfloat16),
    "g8": Case(((17, 33),), num_heads=8, num_kv_heads=1),
    "g16": Case(((9, 40),), num_heads=16, num_kv_heads=1),
    "d80": Case(((33, 80),), head_dim=80, num_heads=2),
    "d96": Case(((33, 80),), head_dim=96, num_heads=2, dtype=torch.float16),
    "d128": Case(((70, 200),), head_dim=128, block_size=64, dtype=torch.bfloat16),
    "d256": Case(((20, 70),), head_dim=256, num_heads=2, dtype=torch.bfloat16),
    "blocks of 32": Case(((30, 290),), block_size=32, dtype=torch.float16),
    "blocks of 64": Case(((30, 290),), block_size=64),
    "blocks of 128": Case(((30, 290),), block_size=128),
    "window": Case(((70, 300),), window=48),
    "window in a block": Case(((70, 300),), window=1, block_size=128),
    "window past the keys": Case(((70, 90),), window=500),
    "window of one tile": Case(((130, 420),), window=128, dtype=torch.bfloat16),
    "soft cap": Case(((40, 90),), soft_cap=2.0),
    "window and soft cap": Case(((40, 90),), soft_cap=1.0, window=30, dtype=torch.bfloat16),
    "fp8": Case(((40, 150),), dtype=torch.bfloat16, cache_dtype=FP8, block_size=64),
    "fp8, soft cap": Case(((40, 90),), dtype=torch.float16, cache_dtype=FP8, soft_cap=2.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_every_tile_size_of_the_portable_kernel(block_n: int, block_size: int, window: int | None) -> None:
    case = Case(
        ((33, 300), (7, 7)), num_kv_heads=1, block_size=block_size, window=window, dtype=torch.bfloat16
    )
    check(case, portable(block_n))


@pytest.mark.parametrize("num_heads", [1, 3, 4])
@pytest.mark.parametrize("window", [None, 70])
def test_programs_that_share_an_item(num_heads: int, window: int | None) -> None:
    case = Case(((45, 100), (3, 3)), num_heads=num_heads, num_kv_heads=1, window=window)
    check(case, portable(32, block_m=32))


def test_no_tokens() -> None:
    case = Case(())
    assert attend(case, build(case)).shape == (0, 4, 64)
    problem = build(case, surplus=0)
    assert problem.items.shape == (0, 4)
    attend(case, problem)


def test_rows_of_no_item_are_left_alone() -> None:
    case = Case(((9, 20), (6, 6)))
    problem = build(case)
    problem.items[0, 2] = 0
    out = attend(case, problem)
    assert out[:9].isnan().all()
    assert_close(out[9:], problem.expected[9:], depth=64)


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    case = Case(((20, 50), (35, 90)), dtype=torch.bfloat16)
    problem = build(case)
    whole = attend(case, problem)
    problem.items[1:, 2] = 0
    assert torch.equal(attend(case, problem)[:20], whole[:20])


def test_large_scores_do_not_overflow() -> None:
    case = Case(((40, 60),))
    problem = build(case)
    out = torch.empty(40, 4, 64, device=DEVICE)
    prefill_attention(
        problem.q * 1e4, problem.key_cache, problem.value_cache, problem.block_table, problem.items, out, 1.0
    )
    assert out.isfinite().all()


def test_tiles_hold_whole_tokens() -> None:
    assert [prefill_tile_tokens(heads, 1, 128) for heads in (1, 3, 4, 7, 8, 16)] == [128, 42, 32, 18, 16, 8]


@pytest.mark.parametrize(
    "device", [H100, DeviceTraits((8, 0), 108, 166_912), DeviceTraits((10, 0), 148, 232_448)]
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_configs_fit_the_device(device: DeviceTraits, head_dim: int, dtype: torch.dtype) -> None:
    for block_size in (16, 32, 64, 128):
        config = prefill_config(head_dim, block_size, dtype, dtype, device, portable=False)
        assert ITEM_ROWS % config.block_m == 0
        padded = 1 << (head_dim - 1).bit_length()
        assert 2 * config.stages * config.block_n * padded * dtype.itemsize <= device.max_shared_bytes
        assert config.variant == "portable" or device.capability == (9, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_cache": torch.zeros(3, 2, 16, 48), "value_cache": torch.zeros(3, 2, 16, 48)}, "head_dim"),
        ({"key_cache": torch.zeros(3, 3, 16, 64), "value_cache": torch.zeros(3, 3, 16, 64)}, "heads"),
        ({"key_cache": torch.zeros(3, 2, 8, 64), "value_cache": torch.zeros(3, 2, 8, 64)}, "block_size"),
        ({"key_cache": torch.zeros(3, 2, 16, 64).half()}, "float16"),
        ({"value_cache": torch.zeros(4, 2, 16, 64)}, "one shape"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_bad_arguments(change: dict[str, object], words: str) -> None:
    arguments = {
        "q": torch.zeros(1, 4, 64),
        "key_cache": torch.zeros(3, 2, 16, 64),
        "value_cache": torch.zeros(3, 2, 16, 64),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "prefill_items": torch.zeros(1, 4, dtype=torch.int32),
        "out": torch.zeros(1, 4, 64),
        "scale": 0.125,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        prefill_attention(**arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED or traits(DEVICE).capability != (9, 0), reason="Hopper's own instructions")
class TestHopper:
    @pytest.mark.parametrize("ping_pong", [False, True])
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_matches_the_oracle(self, case: Case, ping_pong: bool) -> None:
        if case.dtype == torch.float32:
            case = replace(case, dtype=torch.bfloat16)
        config = prefill_config(
            case.head_dim, case.block_size, case.dtype, case.cache_dtype or case.dtype, H100
        )
        if config.variant != "hopper":
            pytest.skip("not for this shape")
        check(case, replace(config, ping_pong=ping_pong))
