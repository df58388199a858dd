"""A thousand requests of every kind, and a server that is none the worse for them."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from charonia import LLM, SamplingParams
from support.abuse import KINDS, Canary, Target, fire, mix
from support.prompts import TEXTS
from support.served import TINY_FLAGS, Served, serving

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

COUNT = 1000
THREADS, CONCURRENCY = 2, 12
CLEAR_MARGIN = 1e-3
GROWTH_MB = {"stub": 48.0, "engine": 96.0, "server": 80.0}
"""What a process may add while the second half of the requests runs. After some 2,000 requests stubs swing by 10 around
118, as huge prompts come and go. The engine grows to some 600 in its first 10,000, as grammars and shapes of batches
come up, and stands still there for the next 50,000 (`soak.py`). The server's own code gains 10 to 40 in 1,000 malformed
and broken-off requests."""
GOOD_COUNT, GOOD_GROWTH_MB = 300, 4.0
"""Good requests alone leave nothing behind."""


@pytest.fixture(scope="module")
def canaries(tiny_model: Path) -> list[Canary]:
    """Prompts whose continuation by the tiny model no rounding can change."""
    found = []
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    with LLM(str(tiny_model), load_format="dummy", dtype="float32", cpu_threads=1, max_num_seqs=64) as llm:
        for output in llm.generate(list(TEXTS.values()), params, use_tqdm=False):
            (sequence,) = output.outputs
            best = [sorted((e.logprob for e in p.values()), reverse=True) for p in sequence.logprobs or []]
            if min(first - second for first, second, *_ in best) > CLEAR_MARGIN:
                found.append(Canary(output.prompt or "", sequence.token_ids, sequence.text))
    return found


@pytest.fixture
def served(tmp_path: Path, tiny_model: Path) -> Iterator[Served]:
    flags = (*TINY_FLAGS, "--instances=2", "--max-num-seqs=64")
    with serving(tmp_path, str(tiny_model), *flags) as served:
        yield served


def bombard(served: Served, canaries: list[Canary], names: list[str], seed: int) -> list[str]:
    """Fire from several threads, each with an event loop and connections of its own; returns the failures."""
    failures: list[str] = []

    async def run(part: int) -> list[str]:
        target = Target(served.http_url, served.grpc_url, canaries)
        try:
            return await fire(target, names[part::THREADS], seed + part, CONCURRENCY)
        finally:
            await target.close()

    threads = [
        threading.Thread(target=lambda part=part: failures.extend(asyncio.run(run(part))))  # type: ignore[misc]
        for part in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def memory_mb(pids: dict[str, int]) -> dict[str, float]:
    return {role: psutil.Process(pid).memory_info().rss / 1e6 for role, pid in pids.items()}


def descriptors(pids: dict[str, int]) -> dict[str, int]:
    return {role: psutil.Process(pid).num_fds() for role, pid in pids.items()}


def test_a_thousand_mixed_requests(served: Served, canaries: list[Canary]) -> None:
    assert len(canaries) >= 12
    pids = served.pids()
    names = mix(COUNT, seed=1)
    failures = bombard(served, canaries, [*KINDS, *names[: COUNT // 2]], 1)
    served.wait_idle()
    middle = memory_mb(pids), descriptors(pids)
    failures += bombard(served, canaries, names[COUNT // 2 :], 2)
    metrics = served.wait_idle()
    end = memory_mb(pids), descriptors(pids)
    assert failures == []
    assert served.pids() == pids, served.everything()
    assert served.is_serving()
    assert [status["state"] for status in served.engines()] == ["ready"]
    assert metrics["charonia_kv_cache_blocks_total"] > 0
    memory = {role: (round(mb), round(end[0][role])) for role, mb in middle[0].items()}
    assert all(after - before < GROWTH_MB[role.split()[0]] for role, (before, after) in memory.items()), (
        memory
    )
    assert all(end[1][role] - count < 20 for role, count in middle[1].items()), (middle[1], end[1])
    good = ["grpc_canary", "http_canary", "sse_canary"] * (GOOD_COUNT // 3)
    assert bombard(served, canaries, good, 3) == []
    before = memory_mb(pids)
    assert bombard(served, canaries, good, 4) == []
    growth = {role: mb - before[role] for role, mb in memory_mb(pids).items()}
    assert max(growth.values()) < GOOD_GROWTH_MB, growth
