"""Counters and gauges of one engine, kept in one place."""

import time

import msgspec

from charonia.core.histogram import Histogram

STEP_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0, 60.0,
)  # fmt: skip
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges are the latest values, counters and histograms only grow. Token counts unless named otherwise.

    started: when the engine began to count (CLOCK_MONOTONIC); tells it from the engines before and after it.
    step_seconds: from a step's launch to its result; with lookahead it includes the wait for the step before.
    step_tokens, step_sequences: tokens that a step computes, and the sequences whose they are.
    """

    started: float = msgspec.field(default_factory=time.monotonic)
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    block_size: int = 0
    steps: int = 0
    step_seconds: Histogram = msgspec.field(default_factory=lambda: Histogram.empty(STEP_SECONDS))
    step_tokens: Histogram = msgspec.field(default_factory=lambda: Histogram.empty(STEP_TOKENS))
    step_sequences: Histogram = msgspec.field(default_factory=lambda: Histogram.empty(STEP_SEQUENCES))
    scheduled_tokens: int = 0
    generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    requests_refused: int = 0
    requests_finished: dict[str, int] = msgspec.field(default_factory=dict)
    """Finished requests by reason: stop, length, abort, error."""

    def note_step(self, num_tokens: int, num_sequences: int) -> None:
        """A step has been planned."""
        self.steps += 1
        self.scheduled_tokens += num_tokens
        self.step_tokens.observe(num_tokens)
        self.step_sequences.observe(num_sequences)
