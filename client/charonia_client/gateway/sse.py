"""Server-sent events, and the end of a request whose client has left."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from charonia_client.gateway.context import context_in
from charonia_client.gateway.errors import ClientDisconnectedError, as_api_error

logger = logging.getLogger("charonia.gateway")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One event; `data` is JSON, so it has no line breaks."""
    return b"data: " + data + b"\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects (`ClientDisconnectedError`).

    The request's body must have been read.
    """
    return await _race(request.scope, request.receive, work)


async def _race(scope: Any, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        scope["charonia.disconnected"] = True
        raise ClientDisconnectedError
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events.

    An error after the first event can have no status of its own: it is sent as an event, and the stream ends
    there. The generator is closed however the stream ends, which cancels what it waits for.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        """first: what came of `events` already. Each item is one or more whole events."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    @classmethod
    async def start(cls, events: AsyncGenerator[bytes, None]) -> "EventStream":
        """A stream whose first event has come; what fails before it is raised, and gets its own status."""
        try:
            return cls(await anext(events), events)
        except BaseException:
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        try:
            await _race(scope, receive, self._send(send, context_in(scope).request_id))
        except (ClientDisconnectedError, OSError):
            scope["charonia.disconnected"] = True

    async def _send(self, send: Send, request_id: str) -> None:
        async with aclosing(self._events):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                answer = as_api_error(error)
                if answer.status == 500:
                    logger.error("request %s: its stream ended with %r", request_id, error)
                await send({"type": "http.response.body", "body": event(answer.body()), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
