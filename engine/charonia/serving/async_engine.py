"""A frontend's side of the engine: submit, stream, abort. Any number of frontends share one engine process."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.errors import CharoniaError, ConfigError, EngineDeadError, RequestCancelledError
from charonia.model_config import ModelConfig
from charonia.outputs import EmbeddingRequestOutput, RequestOutput
from charonia.request import EngineRequest, TokenDelta
from charonia.serving import wire
from charonia.serving.engine_home import EngineHome
from charonia.serving.engine_link import EngineLink, EngineLostError
from charonia.serving.input_processor import InputProcessor
from charonia.serving.live_embedding import LiveEmbedding
from charonia.serving.live_request import LiveRequest
from charonia.serving.mailbox import Mailbox
from charonia.serving.metrics import TokenMeter
from charonia.serving.processes import is_alive
from charonia.serving.request import EmbeddingRequest, GenerationRequest, OutputSink
from charonia.serving.utility import answer_utility
from charonia.text import Tokenizer

logger = logging.getLogger("charonia.frontend")

RESTART_BACKOFF_S = 0.5
DEFAULT_STARTUP_TIMEOUT_S = 600.0


@dataclass(eq=False, slots=True)
class RequestHandle:
    """A submitted request, for `AsyncEngine.abort`."""

    live: LiveRequest | LiveEmbedding
    sink: OutputSink
    engine_requests: list[EngineRequest] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Submit:
    handle: RequestHandle


@dataclass(frozen=True, slots=True)
class _Abort:
    handle: RequestHandle


@dataclass(frozen=True, slots=True)
class _Shutdown:
    drain_timeout_s: float


class AsyncEngine:
    """Client of an engine process, which it starts if no other frontend has.

    One thread owns the connection: it sends what `submit` and `abort` ask for, turns token ids into text, and calls
    the sinks. When the engine dies every live request ends with `EngineDeadError`, and a new engine is started, a
    bounded number of times.
    """

    def __init__(self, config: EngineConfig, home: EngineHome, member: str, owner_pid: int) -> None:
        """Use `attach`, which also waits until the engine is ready."""
        if config.skip_tokenizer_init:
            raise ConfigError(
                "'skip_tokenizer_init' is for the offline LLM: a served model needs its tokenizer"
            )
        model = ModelConfig.from_dir(config.model)
        self._inputs = InputProcessor(config, model, Tokenizer.from_dir(config.tokenizer_dir), salt=member)
        self._config = config
        self._home = home
        self._member = member
        self._owner_pid = owner_pid
        self._commands: Mailbox[_Submit | _Abort | _Shutdown] = Mailbox()
        self._live: dict[int, RequestHandle] = {}
        self._gate = threading.Lock()
        """Held to submit and to become not ready, so that what ends all requests misses none."""
        self._ready = False
        self._why_not_ready = "the engine is starting"
        self._closing = False
        self._stats = EngineStats()
        self.meter = TokenMeter()
        """Counts the tokens of this frontend's requests."""
        self._first_ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="charonia-frontend", daemon=True)

    @classmethod
    def attach(
        cls, config: EngineConfig, *, runtime_dir: Path, member: str = "main", owner_pid: int | None = None,
        startup_timeout_s: float = DEFAULT_STARTUP_TIMEOUT_S, engine_command: Sequence[str] = (),
    ) -> "AsyncEngine":  # fmt: skip
        """Join the engine of `runtime_dir`, or start it; returns once it is ready.

        runtime_dir: private directory (mode 0700; created if missing) that all frontends of the engine share.
        member: this frontend's name, unique among them. owner_pid: the process that the engine must not outlive, by
        default this one. engine_command: see `EngineHome`. Raises what loading raises (`ModelLoadError`,
        `ConfigError`), or `EngineDeadError`.
        """
        engine = cls(config, EngineHome(runtime_dir, engine_command), member, owner_pid or os.getpid())
        engine._thread.start()
        try:
            engine._first_ready.result(startup_timeout_s)
        except TimeoutError:
            engine.shutdown(0.0)
            raise EngineDeadError(f"the engine was not ready within {startup_timeout_s:g} s") from None
        return engine

    # ---- for callers, on any thread ----

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._ready and not self._closing

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._inputs.tokenizer

    @property
    def max_model_len(self) -> int:
        """The context length in tokens."""
        return self._inputs.max_model_len

    def stats(self) -> EngineStats:
        """The engine's latest counters and gauges; at most about a second old."""
        return self._stats

    def submit(self, request: GenerationRequest | EmbeddingRequest, sink: OutputSink) -> RequestHandle:
        """Tokenise, check and queue a request; its outputs go to `sink` on the frontend's thread.

        Raises `InvalidRequestError`, `UnsupportedError`, or `EngineDeadError` when the engine is not ready; the sink
        is then not called. A full queue is reported to the sink, as `QueueFullError`.
        """
        self._check_ready()
        inputs = self._inputs
        prompt, token_ids = inputs.tokenize(request)
        live: LiveRequest | LiveEmbedding
        if isinstance(request, EmbeddingRequest):
            engine_requests = inputs.expand_embedding(request, token_ids)
            live = LiveEmbedding(request, token_ids, meter=self.meter)
        else:
            engine_requests = inputs.expand(request, token_ids)
            live = LiveRequest(
                request, prompt, token_ids, inputs.tokenizer, inputs.eos_token_ids,
                final_only=not request.stream, meter=self.meter,
            )  # fmt: skip
        handle = RequestHandle(live, sink, engine_requests)
        with self._gate:
            self._check_ready()
            self._commands.put(_Submit(handle))
        return handle

    def answer_utility(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the frontend answers by itself: see `charonia.serving.utility`. Raises `InvalidRequestError`."""
        return answer_utility(self._inputs, request)

    def abort(self, handle: RequestHandle) -> None:
        """End a request; its sink gets `RequestCancelledError`, unless it has ended already."""
        self._commands.put(_Abort(handle))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        """Stream a request's deltas. Leaving the iteration early aborts the request. Raises as `submit`."""
        async for output in self._outputs(request):
            if isinstance(output, RequestOutput):
                yield output

    async def embed(self, request: EmbeddingRequest) -> EmbeddingRequestOutput:
        """Make an embedding. Cancellation aborts the request. Raises as `submit`."""
        async for output in self._outputs(request):
            if isinstance(output, EmbeddingRequestOutput):
                return output
        raise EngineDeadError("the engine sent no embedding")

    async def _outputs(
        self, request: GenerationRequest | EmbeddingRequest
    ) -> AsyncIterator[RequestOutput | EmbeddingRequestOutput]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[RequestOutput | EmbeddingRequestOutput | CharoniaError] = asyncio.Queue()
        handle = self.submit(request, _QueueSink(loop, queue))
        ended = False
        try:
            while not ended:
                item = await queue.get()
                if isinstance(item, CharoniaError):
                    ended = True
                    raise item
                ended = item.finished
                yield item
        finally:
            if not ended:
                self.abort(handle)

    def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, give live ones `drain_timeout_s` seconds, end the rest with `EngineDeadError`, leave.

        The engine process ends with its last frontend; in that case returns when it is gone.
        """
        self._closing = True
        self._commands.put(_Shutdown(drain_timeout_s))
        if self._thread.is_alive():
            self._thread.join()

    def _check_ready(self) -> None:
        if self._closing:
            raise EngineDeadError("the model is shutting down")
        if not self._ready:
            raise EngineDeadError(f"the model is not ready: {self._why_not_ready}")

    # ---- the frontend's thread ----

    def _run(self) -> None:
        """Serve one engine after the other, until told to stop or too many have died."""
        died = 0
        while True:
            link = None
            try:
                link = EngineLink.open(
                    self._home, self._config, self._member, self._owner_pid, self._closing_now
                )
                self._set_ready(True)
                self._serve(link)
                return
            except EngineLostError as error:
                self._why_not_ready = str(error)
                self._lose_engine(error)
            except CharoniaError as error:
                self._why_not_ready = str(error)
                if not self._first_ready.done():
                    self._first_ready.set_exception(error)
                else:
                    logger.error("the engine could not be restarted: %s", error)
                self._lose_engine(error)
                return
            except Exception as error:
                # Whatever went wrong here, no request may be left waiting.
                logger.exception("the frontend failed")
                self._why_not_ready = f"the frontend failed: {type(error).__name__}"
                if not self._first_ready.done():
                    self._first_ready.set_exception(error)
                self._lose_engine(EngineDeadError(self._why_not_ready))
                return
            finally:
                self._set_ready(False)
                if link is not None:
                    link.close()
            died += 1
            if not is_alive(self._owner_pid):
                self._give_up("the process that owns the engine has died")
                return
            if self._closing or self._home.restarts_left() <= 0:
                self._give_up(f"the engine died too often; the last time: {self._why_not_ready}")
                self._home.give_up(self._why_not_ready)
                return
            logger.error("the engine was lost (%s); starting another", self._why_not_ready)
            time.sleep(min(8.0, RESTART_BACKOFF_S * 2 ** (died - 1)))

    def _closing_now(self) -> bool:
        return self._closing

    def _set_ready(self, ready: bool) -> None:
        with self._gate:
            self._ready = ready
        if ready and not self._first_ready.done():
            self._first_ready.set_result(None)

    def _give_up(self, reason: str) -> None:
        self._why_not_ready = reason
        logger.error("%s", reason)
        if not self._first_ready.done():
            self._first_ready.set_exception(EngineDeadError(reason))

    def _lose_engine(self, error: CharoniaError) -> None:
        """End every live request, those not yet sent included; none is taken from here on."""
        self._set_ready(False)
        self.meter.forget_sequences()
        handles = {id(handle): handle for handle in self._live.values()}
        self._live.clear()
        for command in self._commands.take():
            if isinstance(command, _Submit):
                handles[id(command.handle)] = command.handle
            elif isinstance(command, _Shutdown):
                self._closing = True
        for handle in handles.values():
            try:
                handle.sink.on_error(EngineDeadError(f"the engine was lost: {error}"))
            except Exception:
                # One sink at fault must not leave the other requests waiting.
                logger.exception("a request could not be told that the engine was lost")

    def _serve(self, link: EngineLink) -> None:
        """Shuttle messages until shutdown. Raises `EngineLostError`."""
        deadline: float | None = None
        while True:
            timeout = 1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            frames = link.wait(self._commands.fileno(), timeout)
            for frame in frames:
                if frame.stats is not None:
                    self._stats = frame.stats
                if frame.deltas:
                    self.meter.note_step(frame.deltas, time.monotonic())
                    self._dispatch(link, frame.deltas)
            for command in self._commands.take():
                if isinstance(command, _Submit):
                    self._start(link, command.handle)
                elif isinstance(command, _Abort):
                    self._cancel(link, command.handle)
                else:
                    deadline = time.monotonic() + command.drain_timeout_s
            if deadline is not None and (not self._live or time.monotonic() >= deadline):
                self._lose_engine(EngineDeadError("the model is shutting down"))
                link.leave()
                return

    def _start(self, link: EngineLink, handle: RequestHandle) -> None:
        first_id = handle.live.first_id = link.take_ids(len(handle.engine_requests))
        requests = [
            msgspec.structs.replace(request, request_id=first_id + request.request_id)
            for request in handle.engine_requests
        ]
        handle.engine_requests = []
        for request_id in handle.live.engine_ids:
            self._live[request_id] = handle
        link.send(wire.Submit(requests))

    def _cancel(self, link: EngineLink, handle: RequestHandle) -> None:
        ids = [request_id for request_id in handle.live.engine_ids if self._live.get(request_id) is handle]
        if ids:
            self._forget(handle)
            link.send(wire.Abort(ids))
            handle.sink.on_error(RequestCancelledError("the request was cancelled"))

    def _dispatch(self, link: EngineLink, deltas: list[TokenDelta]) -> None:
        """Feed a step's deltas to their requests, then show what each of them has to show."""
        touched: dict[int, RequestHandle] = {}
        for delta in deltas:
            handle = self._live.get(delta.request_id)
            if handle is not None:
                handle.live.push(delta)
                touched[id(handle)] = handle
        aborts: list[int] = []
        for handle in touched.values():
            live = handle.live
            aborts.extend(live.take_aborts())
            if live.finished:
                self._forget(handle)
            output = live.take()
            if live.error is not None:
                handle.sink.on_error(live.error)
            elif output is not None:
                handle.sink.on_output(output)
        if aborts:
            link.send(wire.Abort(aborts))

    def _forget(self, handle: RequestHandle) -> None:
        for request_id in handle.live.engine_ids:
            del self._live[request_id]


class _QueueSink:
    """Carries outputs from the frontend's thread into an asyncio queue."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: "asyncio.Queue[RequestOutput | EmbeddingRequestOutput | CharoniaError]",
    ) -> None:
        self._loop = loop
        self._queue = queue

    def on_output(self, output: RequestOutput | EmbeddingRequestOutput) -> None:
        self._put(output)

    def on_error(self, error: CharoniaError) -> None:
        self._put(error)

    def _put(self, item: RequestOutput | EmbeddingRequestOutput | CharoniaError) -> None:
        # A loop that has been closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
