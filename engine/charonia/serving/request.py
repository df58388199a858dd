"""What a frontend hands to the engine's client, and what it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from charonia.errors import CharoniaError
from charonia.outputs import EmbeddingRequestOutput, RequestOutput
from charonia.pooling_params import PoolingParams
from charonia.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatInput:
    """A conversation, rendered with the model's own chat template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request as a client states it: a text, a list of token ids or a chat, and how to continue it.

    request_id: the caller's own name for it; need not be unique. priority: lower runs first. timeout_s: from now on.
    arrival: when it reached the frontend (CLOCK_MONOTONIC, in seconds), from where its timings count; by default, when
    it is submitted. trace_headers: W3C trace context (`traceparent`, `tracestate`) of whoever sent it.
    """

    prompt: str | Sequence[int] | ChatInput
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    stream: bool = True
    """Whether outputs are wanted as they come; else the sink gets one, at the end."""
    arrival: float | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """One text, or list of token ids, and how to embed it. The other fields are those of `GenerationRequest`."""

    prompt: str | Sequence[int]
    params: PoolingParams = field(default_factory=PoolingParams)
    request_id: str = ""
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    arrival: float | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)


class OutputSink(Protocol):
    """Receives one request's outputs, in order, on the client's receiver thread: must return at once, never raise.

    The last call is either `on_output` with `finished` set, or `on_error`; exactly one of them, exactly once.
    """

    def on_output(self, output: RequestOutput | EmbeddingRequestOutput) -> None:
        """Take a delta: `outputs` holds what is new of each sequence that has news. An embedding comes whole."""

    def on_error(self, error: CharoniaError) -> None:
        """Take the error that ended the request."""
