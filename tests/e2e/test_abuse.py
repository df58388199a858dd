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
GROWTH_MB = 16.0
"""What a process may add while the second half of the requests runs."""


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


def test_a_thousand_mixed_requests(
    served: Served, canaries: list[Canary], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(canaries) >= 12
    before = served.pids()
    assert bombard(served, canaries, [*KINDS], 0) == []
    served.wait_idle()
    start = memory_mb(before), descriptors(before)
    names = mix(COUNT, seed=1)
    failures = bombard(served, canaries, names[: COUNT // 2], 1)
    served.wait_idle()
    middle = memory_mb(before), descriptors(before)
    failures += bombard(served, canaries, names[COUNT // 2 :], 2)
    metrics = served.wait_idle()
    end = memory_mb(before), descriptors(before)
    with capsys.disabled():
        print(f"\n{start=}\n{middle=}\n{end=}\n")
    assert failures == []
    assert served.pids() == before, served.everything()
    assert served.is_serving()
    assert [status["state"] for status in served.engines()] == ["ready"]
    assert metrics["charonia_kv_cache_blocks_total"] > 0
    for role, rss in end[0].items():
        assert rss - middle[0][role] < GROWTH_MB, (role, start[0], middle[0], end[0])
        assert end[1][role] - middle[1][role] < 20, (role, start[1], middle[1], end[1])
    assert bombard(served, canaries, ["grpc_canary", "http_canary", "sse_canary"] * 8, 3) == []
