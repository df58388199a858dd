"""The synchronous client: the asyncio client on a background thread."""

import asyncio
import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, Self, SupportsIndex, TypeAlias, TypeVar, Unpack, overload

from charonia_client.aio import AsyncCharoniaClient, AsyncResponseStream
from charonia_client.endpoint import Protocol
from charonia_client.errors import RequestCancelledError
from charonia_client.metadata import ModelMetadata, ServerHealth, ServerMetadata
from charonia_client.requests import DEFAULT_MODEL, ChatOptions, Message, RequestOptions
from charonia_client.results import GenerateResult, StreamChunk

T = TypeVar("T")
_Inbox: TypeAlias = "queue.SimpleQueue[StreamChunk | Exception]"


class _LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="charonia-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt here (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what still runs there, stop the loop and wait for the thread."""
        self.run(_cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    @property
    def current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class ResponseStream:
    """The chunks of one streaming request: an iterator, and a context manager that cancels on exit.

    The request is sent at once, and chunks gather until they are read. One thread iterates; any may call
    `cancel`. Dropping the stream unread cancels it too.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, chunks: AsyncResponseStream, url: str) -> None:
        self.request_id = chunks.request_id
        self._inbox: _Inbox = queue.SimpleQueue()
        self._ended = False
        self._future = asyncio.run_coroutine_threadsafe(_pump(chunks, self._inbox), loop)
        self._future.add_done_callback(_tell_cancelled(self._inbox, self.request_id, url))

    def __iter__(self) -> Self:
        """Iterate over what is left of the stream."""
        return self

    def __next__(self) -> StreamChunk:
        """The next chunk, as soon as it is there."""
        if self._ended:
            raise StopIteration
        item = self._inbox.get()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        return item

    def cancel(self) -> None:
        """Cancel the request unless it has ended: the iterating thread gets `RequestCancelledError`."""
        self._future.cancel()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Cancel the request unless it has ended."""
        self.cancel()

    def __del__(self) -> None:
        """Cancel a request whose chunks nobody can read any more."""
        self.cancel()


# Neither of these holds the `ResponseStream`: nothing but its user keeps it alive.


async def _pump(chunks: AsyncResponseStream, inbox: _Inbox) -> None:
    """Move a stream into a queue; its end is the exception that the reader is to raise."""
    try:
        async with chunks:
            async for chunk in chunks:
                inbox.put(chunk)
        inbox.put(StopIteration())
    except Exception as error:
        inbox.put(error)


def _tell_cancelled(
    inbox: _Inbox, request_id: str, url: str
) -> Callable[[concurrent.futures.Future[None]], None]:
    """Tells the reader when the pump was cancelled, be it before its first step."""

    def tell(pump: concurrent.futures.Future[None]) -> None:
        if pump.cancelled():
            inbox.put(RequestCancelledError(f"request {request_id} was cancelled", url=url))

    return tell


class CharoniaClient:
    """Speaks to one Triton server that serves Charonia models, from any number of threads.

    The arguments are those of `AsyncCharoniaClient`. All requests run on one background thread; `close`, or
    leaving the context, ends it and cancels what is in flight. An interrupt (Ctrl-C) cancels the request that
    was waited for.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: Protocol | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 2,
        requests_per_stream: int = 8,
    ) -> None:
        self._client = AsyncCharoniaClient(
            url, protocol=protocol, headers=headers, retries=retries, requests_per_stream=requests_per_stream
        )
        self.url = self._client.url
        self._thread = _LoopThread()
        self._close = weakref.finalize(self, _shut_down, self._thread, self._client)

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[SupportsIndex] | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerateResult:
        """Continue a text or token ids and return the whole answer. Keywords: `RequestOptions`."""
        return self._run(self._client.generate(prompt, token_ids=token_ids, **options))

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[SupportsIndex] | None = None,
        **options: Unpack[RequestOptions],
    ) -> ResponseStream:
        """Continue a text or token ids and yield the answer as it comes. Keywords: `RequestOptions`."""
        return self._start(self._client.stream(prompt, token_ids=token_ids, **options))

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> GenerateResult: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> ResponseStream: ...

    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> GenerateResult | ResponseStream:
        """Answer a conversation through the model's own chat template. Keywords: `ChatOptions`.

        ``client.chat(messages)`` gives the whole answer, ``client.chat(messages, stream=True)`` its chunks.
        """
        if stream:
            return self._start(self._client.chat(messages, stream=True, **options))
        return self._run(self._client.chat(messages, **options))

    def health(self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0) -> ServerHealth:
        """How the server and a model are. Raises `ServerUnavailableError` if nothing answers."""
        return self._run(self._client.health(model, timeout=timeout))

    def is_ready(self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0) -> bool:
        """Whether requests for `model` would be taken now; False as well if nothing answers."""
        return self._run(self._client.is_ready(model, timeout=timeout))

    def server_metadata(self, *, timeout: float | None = 5.0) -> ServerMetadata:
        """Name, version and extensions of the server."""
        return self._run(self._client.server_metadata(timeout=timeout))

    def model_metadata(self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0) -> ModelMetadata:
        """Versions and tensors of a model. Raises `NotFoundError` if the server does not have it."""
        return self._run(self._client.model_metadata(model, timeout=timeout))

    def model_config(self, model: str = DEFAULT_MODEL, *, timeout: float | None = 5.0) -> dict[str, Any]:
        """A model's configuration as the server completed it. Raises `NotFoundError` if the server does not
        have it.
        """
        return self._run(self._client.model_config(model, timeout=timeout))

    def close(self) -> None:
        """Cancel what is in flight and end the background thread; may be called again."""
        self._close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the client."""
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._close.alive:
            coroutine.close()
            raise RuntimeError("the client is closed")
        try:
            return self._thread.run(coroutine)
        except concurrent.futures.CancelledError:
            raise RequestCancelledError("the client was closed", url=self.url) from None

    def _start(self, chunks: AsyncResponseStream) -> ResponseStream:
        if not self._close.alive:
            raise RuntimeError("the client is closed")
        return ResponseStream(self._thread.loop, chunks, self.url)


def _shut_down(thread: _LoopThread, client: AsyncCharoniaClient) -> None:
    if thread.current:
        # The garbage collector may end a forgotten client anywhere, there included, where nothing may wait.
        thread.loop.stop()
        return
    thread.run(client.aclose())
    thread.stop()
