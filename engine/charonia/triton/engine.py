"""What the adapter needs of an engine; `charonia.serving.async_engine.AsyncEngine` is the one that it serves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.serving.metrics import TokenMeter
from charonia.serving.request import EmbeddingRequest, GenerationRequest, OutputSink


class EngineClient(Protocol):
    """A frontend's connection to the engine of its model. Thread-safe."""

    @property
    def is_ready(self) -> bool:
        """Whether requests would be taken now."""

    @property
    def max_model_len(self) -> int:
        """The context length in tokens."""

    @property
    def meter(self) -> TokenMeter:
        """Counts the tokens of this frontend's requests."""

    def submit(self, request: GenerationRequest | EmbeddingRequest, sink: OutputSink) -> Any:
        """Tokenise, validate and queue; returns a handle for `abort`. Raises `CharoniaError`."""

    def answer_utility(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer what needs no engine: tokens of a text and the like. Raises `InvalidRequestError`."""

    def abort(self, handle: Any) -> None:
        """End a request in whatever state it is; without effect once it has ended."""

    def stats(self) -> EngineStats:
        """The latest counters and gauges of the whole engine."""

    def shutdown(self, drain_timeout_s: float) -> None:
        """Wait for live requests, abort the rest, detach."""


class ConnectEngine(Protocol):
    """Joins the engine of a model, starting it when nobody has; returns once it is ready."""

    def __call__(
        self, config: EngineConfig, *, runtime_dir: Path, member: str, owner_pid: int
    ) -> EngineClient:
        """Connect. Raises `CharoniaError`."""
