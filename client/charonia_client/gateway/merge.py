"""What one request of a client asks of the model in parts: the parts' results, or their streams as one."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

MAX_CONCURRENT = 64
"""Requests to the model that one request of a client has in flight: more would fill the model's queue by themselves."""

_MAX_WAITING = 16
"""Items that may wait for the reader."""


async def results(work: Callable[[S], Awaitable[T]], parts: Iterable[S]) -> list[T]:
    """What `work` makes of each part, in order; `MAX_CONCURRENT` run at a time. The first error ends all of them."""
    room = asyncio.Semaphore(MAX_CONCURRENT)

    async def one(part: S) -> T:
        async with room:
            return await work(part)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(part)) for part in parts]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's number; `MAX_CONCURRENT` streams run at a time.

    The first error of any stream ends all of them, and so does closing the generator.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    inbox: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(_MAX_WAITING)
    room = asyncio.Semaphore(MAX_CONCURRENT)
    tasks = [asyncio.create_task(_pump(number, stream, inbox, room)) for number, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            got = await inbox.get()
            if got is None:
                left -= 1
            elif isinstance(got, Exception):
                raise got
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    number: int,
    stream: AsyncGenerator[T, None],
    inbox: "asyncio.Queue[tuple[int, T] | Exception | None]",
    room: asyncio.Semaphore,
) -> None:
    try:
        async with room, aclosing(stream):
            async for item in stream:
                await inbox.put((number, item))
        await inbox.put(None)
    except Exception as error:
        await inbox.put(error)
