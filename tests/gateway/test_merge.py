"""Parts of a request: nothing of them is left behind, however they end."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from charonia_client.gateway import merge


class Parts:
    """Streams that count how many run, and tasks that do."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0

    async def stream(self, number: int, length: int, *, fails: bool = False) -> AsyncGenerator[str, None]:
        self._begin()
        try:
            for i in range(length):
                await asyncio.sleep(0)
                yield f"{number}.{i}"
            if fails:
                raise ValueError(f"part {number}")
        finally:
            self.running -= 1

    async def result(self, number: int) -> int:
        self._begin()
        try:
            await asyncio.sleep(0.001 * (number % 3))
            if number == 13:
                raise ValueError("part 13")
            return number * number
        finally:
            self.running -= 1

    def _begin(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr(merge, "MAX_CONCURRENT", 4)
    return Parts()


def others() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 30])
async def test_every_item_of_every_stream_comes_in_order(parts: Parts, count: int) -> None:
    got: dict[int, list[str]] = {number: [] for number in range(count)}
    async for number, item in merge.merged([parts.stream(number, 5) for number in range(count)]):
        got[number].append(item)
    assert got == {number: [f"{number}.{i}" for i in range(5)] for number in range(count)}
    assert (parts.running, parts.most, others()) == (0, min(count, 4), set())


@pytest.mark.parametrize("count", [1, 3, 30])
async def test_closing_early_ends_every_stream(parts: Parts, count: int) -> None:
    async with aclosing(merge.merged([parts.stream(number, 10_000) for number in range(count)])) as items:
        for _ in range(40):
            await anext(items)
    assert (parts.running, others()) == (0, set())


async def test_one_error_ends_every_stream(parts: Parts) -> None:
    streams = [parts.stream(0, 10_000), parts.stream(1, 3, fails=True), parts.stream(2, 10_000)]
    with pytest.raises(ValueError, match="part 1"):
        async for _ in merge.merged(streams):
            pass
    assert (parts.running, others()) == (0, set())


async def test_results_come_in_order_a_few_at_a_time(parts: Parts) -> None:
    assert await merge.results(parts.result, range(12)) == [number * number for number in range(12)]
    assert (parts.running, parts.most) == (0, 4)


async def test_the_first_error_is_raised_and_ends_the_rest(parts: Parts) -> None:
    with pytest.raises(ValueError, match="part 13"):
        await merge.results(parts.result, range(1000))
    assert (parts.running, others()) == (0, set())
