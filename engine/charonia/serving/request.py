"""What a frontend hands to the engine's client, and what it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from charonia.errors import CharoniaError
from charonia.outputs import RequestOutput
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
    """

    prompt: str | Sequence[int] | ChatInput
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""


class OutputSink(Protocol):
    """Receives one request's outputs, in order, on the client's receiver thread: must return at once, never raise.

    The last call is either `on_output` with `finished` set, or `on_error`; exactly one of them, exactly once.
    """

    def on_output(self, output: RequestOutput) -> None:
        """Take a delta: `outputs` holds what is new of each sequence that has news."""

    def on_error(self, error: CharoniaError) -> None:
        """Take the error that ended the request."""
