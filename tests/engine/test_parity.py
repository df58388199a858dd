"""Greedy output is that of transformers, token by token, whatever happens around a request."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from charonia.entrypoints.default_model import ensure_default_model
from charonia.text import Tokenizer
from support.core_driver import CoreDriver, Sequel
from support.prompts import LONG, parity_prompts
from support.reference import Golden, Reference, greedy_golden
from support.tiny_models import TINY_MODELS, save_tiny_model, tiny_model

pytestmark = pytest.mark.timeout(900)  # the first run computes what it is compared with

NUM_TOKENS = 16
CLEAR_MARGIN = 5e-4
"""Logits of two correct fp32 implementations differ by less; a smaller margin would decide nothing."""


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> dict[str, list[int]]:
    return parity_prompts(Tokenizer.from_dir(model_dir))


@pytest.fixture(scope="module")
def goldens(model_dir: Path, prompts: dict[str, list[int]], pytestconfig: pytest.Config) -> dict[str, Golden]:
    torch.set_num_threads(2)
    reference = Reference(model_dir, pytestconfig.cache.mkdir("greedy"))
    return {name: reference.golden(prompt, NUM_TOKENS) for name, prompt in prompts.items()}


@pytest.fixture(scope="module")
def engine(model_dir: Path, goldens: dict[str, Golden]) -> Iterator[CoreDriver]:
    """The settings of a server, asynchronous scheduling and prefix caching included."""
    driver = CoreDriver(model_dir, max_num_seqs=24, max_model_len=2100)
    yield driver
    driver.core.shutdown()


def assert_golden(names: list[str], sequels: list[Sequel], goldens: dict[str, Golden]) -> None:
    wrong = {
        name: (sequel.token_ids, goldens[name].tokens)
        for name, sequel in zip(names, sequels, strict=True)
        if sequel.token_ids != goldens[name].tokens
    }
    assert not wrong


def short(prompts: dict[str, list[int]], limit: int = 60) -> list[str]:
    return [name for name, prompt in prompts.items() if len(prompt) <= limit]


def test_the_prompts_leave_no_doubt(prompts: dict[str, list[int]], goldens: dict[str, Golden]) -> None:
    lengths = [len(prompt) for prompt in prompts.values()]
    assert len(prompts) >= 40 and min(lengths) == 1 and max(lengths) == 2000
    assert {name: g.margin for name, g in goldens.items() if g.margin < CLEAR_MARGIN} == {}


def test_alone_and_together(
    engine: CoreDriver, prompts: dict[str, list[int]], goldens: dict[str, Golden]
) -> None:
    """All prompts in random order, arriving while others run: prefills and decodes mix in one step."""
    names = list(prompts)
    sequels = engine.run_staggered(list(prompts.values()), NUM_TOKENS, random.Random(1))
    assert_golden(names, sequels, goldens)
    alone = engine.run([prompts["chat"]], NUM_TOKENS)
    assert_golden(["chat"], alone, goldens)


def test_prefix_hits(engine: CoreDriver, prompts: dict[str, list[int]], goldens: dict[str, Golden]) -> None:
    names = [name for name in prompts if name in LONG]
    batch = [prompts[name] for name in names]
    engine.run(batch, NUM_TOKENS)
    before = engine.core.stats().scheduled_tokens
    again = engine.run(batch, NUM_TOKENS)
    assert_golden(names, again, goldens)
    for prompt, sequel in zip(batch, again, strict=True):
        assert sequel.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert engine.core.stats().scheduled_tokens - before < 16 * len(batch) + NUM_TOKENS * len(batch)


def test_cancelled_neighbours(
    engine: CoreDriver, prompts: dict[str, list[int]], goldens: dict[str, Golden]
) -> None:
    names = short(prompts)
    aborted = engine.core.stats().requests_finished.get("abort", 0)
    batch = [prompts[name] for name in names]
    sequels = engine.run_staggered(batch, NUM_TOKENS, random.Random(2), doomed=0.7)
    assert_golden(names, sequels, goldens)
    assert engine.core.stats().requests_finished["abort"] > aborted


@pytest.mark.parametrize(
    ("budget", "block_size", "asynchronous", "limit"), [(37, 16, True, 300), (7, 5, False, 30)]
)
def test_chunked_prefill(
    budget: int, block_size: int, asynchronous: bool, limit: int, model_dir: Path,
    prompts: dict[str, list[int]], goldens: dict[str, Golden],
) -> None:  # fmt: skip
    engine = CoreDriver(
        model_dir, max_num_seqs=7, max_num_batched_tokens=budget, block_size=block_size, max_model_len=2100,
        async_scheduling=asynchronous, max_long_partial_prefills=2,
    )  # fmt: skip
    names = short(prompts, limit)[:: 1 if limit > 100 else 3]
    sequels = engine.run_staggered([prompts[name] for name in names], NUM_TOKENS, random.Random(3))
    engine.core.shutdown()
    assert_golden(names, sequels, goldens)


@pytest.mark.parametrize(("block_size", "blocks", "asynchronous"), [(16, 9, False), (9, 15, True)])
def test_preemption(
    block_size: int, blocks: int, asynchronous: bool, model_dir: Path,
    prompts: dict[str, list[int]], goldens: dict[str, Golden],
) -> None:  # fmt: skip
    engine = CoreDriver(
        model_dir, max_num_seqs=12, block_size=block_size, num_kv_blocks_override=blocks, max_model_len=128,
        async_scheduling=asynchronous,
    )  # fmt: skip
    names = short(prompts)[::2]
    sequels = engine.run_staggered([prompts[name] for name in names], NUM_TOKENS, random.Random(4))
    stats = engine.core.stats()
    engine.core.shutdown()
    assert stats.preemptions > 0
    assert_golden(names, sequels, goldens)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Random batches on too few blocks, in odd chunks, with repeated prompts and cancelled neighbours."""
    generator = torch.Generator().manual_seed(11)
    lengths = (1, 17, 33, 60, 90)
    batch = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]
    batch.append(batch[-2] + batch[1])
    model = tiny_model(name)
    goldens = [greedy_golden(model, prompt, 8) for prompt in batch]
    assert min(golden.margin for golden in goldens) > 1e-5
    batch, goldens = [*batch, batch[-1]], [*goldens, goldens[-1]]
    engine = CoreDriver(
        save_tiny_model(name, tmp_path), max_num_seqs=6, max_num_batched_tokens=23, block_size=7,
        num_kv_blocks_override=29, max_model_len=200, long_prefill_token_threshold=64,
    )  # fmt: skip
    try:
        for seed in range(6):
            sequels = engine.run_staggered(batch, 8, random.Random(seed), doomed=0.5)
            assert [sequel.token_ids for sequel in sequels] == [golden.tokens for golden in goldens]
        stats = engine.core.stats()
        assert stats.preemptions > 0 and stats.prefix_cache_hits > 0
    finally:
        engine.core.shutdown()
