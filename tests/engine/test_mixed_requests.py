"""Requests of every kind in one engine: what each brings depends neither on the others nor on how steps are made."""

import random
from pathlib import Path
from typing import Any

from charonia.pooling_params import PoolingParams
from charonia.sampling_params import SamplingParams
from charonia.structured_params import StructuredOutputsParams
from support.core_driver import CoreDriver, Sequel

NUM_REQUESTS = 80
FORMS: list[dict[str, Any]] = [
    {"regex": "[a-z]+"}, {"regex": r"\d{4}-\d\d"}, {"choice": ["abc", "abd"]}, {"json_object": True},
]  # fmt: skip
FEATURES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"top_p": 0.9, "logprobs": 3},
    {"prompt_logprobs": 2},
    {"min_p": 0.05, "min_tokens": 4},
    {},
]


def add_random(driver: CoreDriver, rng: random.Random) -> None:
    """A plain, constrained or pooling request, whose prompt often begins as those of others do."""
    family = rng.randrange(3) * 50
    prompt = [(family + i * i) % 300 + 3 for i in range(rng.randint(1, 60))]
    kind = rng.randrange(6)
    if kind == 0:
        pooling = PoolingParams(pooling_type=rng.choice(["last", "mean", "cls"]), normalize=True)
        driver.add(prompt, 1, pooling=pooling)
        return
    # Of few tokens, none is drawn by a hair: logits are the same only up to the rounding of the matrix products.
    asked: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.3]), "top_k": 5, "max_tokens": None}
    if kind < 3:
        asked["structured_outputs"] = StructuredOutputsParams(**rng.choice(FORMS))
    else:
        asked |= rng.choice(FEATURES)
    driver.add(
        prompt, rng.randint(1, 40), SamplingParams(**asked), seed=rng.randrange(1000),
        stop_token_ids=rng.choice([[], [5, 6]]), bad_words=rng.choice([[], [], [[9, 9], [11]]]),
    )  # fmt: skip


def run(directory: Path, pace: int, **settings: Any) -> tuple[list[tuple[Any, ...]], int]:
    """What the requests bring, and how often one was preempted. pace: seed of the moments at which they come."""
    driver = CoreDriver(
        directory, load_format="dummy", max_model_len=110, max_num_seqs=6, max_num_batched_tokens=24, block_size=16,
        **settings,
    )  # fmt: skip
    what, when = random.Random(1), random.Random(pace)
    try:
        for _ in range(NUM_REQUESTS):
            add_random(driver, what)
            for _ in range(when.randrange(6)):
                driver.step()
        driver.drain()
        return [brought(sequel) for sequel in driver.sequels.values()], driver.core.stats().preemptions
    finally:
        driver.core.shutdown()


def brought(sequel: Sequel) -> tuple[Any, ...]:
    embedding = None if sequel.embedding is None else [round(value, 4) for value in sequel.embedding]
    scored = [entry.token_ids for entry in sequel.prompt_logprobs]
    alternatives = [entry.token_ids[:2] for entry in sequel.logprobs]
    return sequel.token_ids, sequel.finish_reason, sequel.error, embedding, scored, alternatives


def test_every_kind_with_lookahead_and_without_and_preempted(tiny_dir: Path) -> None:
    expected, preemptions = run(tiny_dir, 0, async_scheduling=False, num_kv_blocks_override=40)
    assert not preemptions and {outcome[2] for outcome in expected} == {None}
    assert run(tiny_dir, 1, async_scheduling=True, num_kv_blocks_override=40) == (expected, 0)
    squeezed, preemptions = run(tiny_dir, 2, async_scheduling=True, num_kv_blocks_override=13)
    assert squeezed == expected and preemptions
