"""A frontend's side of the engine: submit, stream, abort. Any number of frontends share one engine process."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.errors import CharoniaError, ConfigError, EngineDeadError
from charonia.model_config import ModelConfig
from charonia.outputs import EmbeddingRequestOutput, RequestOutput
from charonia.serving.engine_home import EngineHome
from charonia.serving.frontend import Frontend, RequestHandle
from charonia.serving.input_processor import InputProcessor
from charonia.serving.live_embedding import LiveEmbedding
from charonia.serving.live_request import LiveRequest
from charonia.serving.metrics import TokenMeter
from charonia.serving.request import EmbeddingRequest, GenerationRequest, OutputSink
from charonia.serving.utility import answer_utility
from charonia.text import Tokenizer

DEFAULT_STARTUP_TIMEOUT_S = 600.0


class AsyncEngine:
    """Client of an engine process, which it starts if no other frontend has.

    A thread of its own (`frontend.py`) receives what the engine makes, turns token ids into text, and calls the sinks.
    When the engine dies every live request ends with `EngineDeadError`, and a new engine is started, a bounded number
    of times.
    """

    def __init__(self, config: EngineConfig, home: EngineHome, member: str, owner_pid: int) -> None:
        """Use `attach`, which also waits until the engine is ready."""
        if config.skip_tokenizer_init:
            raise ConfigError(
                "'skip_tokenizer_init' is for the offline LLM: a served model needs its tokenizer"
            )
        model = ModelConfig.from_dir(config.model)
        self._inputs = InputProcessor(config, model, Tokenizer.from_dir(config.tokenizer_dir), salt=member)
        self.meter = TokenMeter()
        """Counts the tokens of this frontend's requests."""
        self._frontend = Frontend(config, home, member, owner_pid, self.meter)

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
        try:
            engine._frontend.start(startup_timeout_s)
        except TimeoutError:
            engine.shutdown(0.0)
            raise EngineDeadError(f"the engine was not ready within {startup_timeout_s:g} s") from None
        return engine

    # ---- for callers, on any thread ----

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._frontend.is_ready

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
        return self._frontend.stats

    def submit(self, request: GenerationRequest | EmbeddingRequest, sink: OutputSink) -> RequestHandle:
        """Tokenise, check and send a request; its outputs go to `sink` on the frontend's thread.

        Raises `InvalidRequestError`, `UnsupportedError`, or `EngineDeadError` when the engine is not ready; the sink
        is then not called. A full queue is reported to the sink, as `QueueFullError`.
        """
        self._frontend.check_ready()
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
        self._frontend.submit(handle)
        return handle

    def answer_utility(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the frontend answers by itself: see `charonia.serving.utility`. Raises `InvalidRequestError`."""
        return answer_utility(self._inputs, request)

    def abort(self, handle: RequestHandle) -> None:
        """End a request; its sink gets `RequestCancelledError`, unless it has ended already."""
        self._frontend.abort(handle)

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
        self._frontend.shutdown(drain_timeout_s)


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
