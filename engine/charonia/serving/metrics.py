"""What a frontend counts as a step's tokens arrive. Exporting it is for others, on threads of their own."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from charonia.core.histogram import Histogram
from charonia.outputs import RequestTimings
from charonia.request import TokenDelta

INTER_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Holds the bounds of vLLM's histogram, so that one count serves both."""

_MAX_FIRST_TOKENS = 8192
"""Most requests whose timings wait to be taken; the oldest are forgotten past it."""


@dataclass(slots=True)
class FirstToken:
    """A request whose first token has come. Seconds: queue to its first step, prefill from there, total of both."""

    num_prompt_tokens: int
    queue: float
    prefill: float
    total: float


@dataclass(slots=True)
class TokenCounts:
    """What has come since the counts were taken last. inter_token: seconds between the tokens of a sequence."""

    generation_tokens: int = 0
    prompt_tokens: int = 0
    inter_token: Histogram = field(default_factory=lambda: Histogram.empty(INTER_TOKEN_SECONDS))
    first_tokens: deque[FirstToken] = field(default_factory=lambda: deque(maxlen=_MAX_FIRST_TOKENS))


class TokenMeter:
    """Counts the tokens that reach a frontend, and the time between them. Thread-safe.

    Almost every sequence of a step had its token before in the same earlier step, so a step costs a dictionary entry
    a token and one observation of all of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = TokenCounts()
        self._latest: dict[int, float] = {}
        """When the latest token of each sequence came, by the engine's id."""
        self._previous = 0.0
        """When the step before brought its tokens."""

    def note_step(self, deltas: Sequence[TokenDelta], now: float) -> None:
        """A step's deltas have arrived at `now`. Several tokens in one delta share the time since the one before."""
        latest, previous = self._latest, self._previous
        num_tokens = num_regular = 0
        with self._lock:
            inter_token = self._counts.inter_token
            for delta in deltas:
                num_new = len(delta.token_ids)
                if num_new:
                    num_tokens += num_new
                    before = latest.get(delta.request_id)
                    latest[delta.request_id] = now
                    if before == previous and num_new == 1:
                        num_regular += 1
                    elif before is not None:
                        inter_token.observe((now - before) / num_new, num_new)
                    elif num_new > 1:
                        inter_token.observe(0.0, num_new - 1)
                if delta.finish_reason is not None:
                    latest.pop(delta.request_id, None)
            if num_regular:
                inter_token.observe(now - previous, num_regular)
            self._counts.generation_tokens += num_tokens
        if num_tokens:
            self._previous = now

    def note_first_token(self, timings: RequestTimings, num_prompt_tokens: int) -> None:
        """A request's first token has arrived; `timings` say how long it and the queue took."""
        prefill = max(0.0, timings.first_token - timings.queue)
        first = FirstToken(num_prompt_tokens, timings.queue, prefill, timings.first_token)
        with self._lock:
            self._counts.prompt_tokens += num_prompt_tokens
            self._counts.first_tokens.append(first)

    def note_prompt(self, num_prompt_tokens: int) -> None:
        """A prompt has been embedded: no token comes after it."""
        with self._lock:
            self._counts.prompt_tokens += num_prompt_tokens

    def forget_sequences(self) -> None:
        """The engine is gone, and with it every sequence."""
        self._latest.clear()

    def take(self) -> TokenCounts:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, TokenCounts()
        return counts
