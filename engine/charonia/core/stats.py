"""Counters and gauges of one engine, kept in one place."""

import msgspec


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges are the latest values, counters only grow. Token counts unless named otherwise.

    step_seconds: time from a step's launch to its result, summed over steps.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    block_size: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    scheduled_tokens: int = 0
    generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    requests_refused: int = 0
    requests_finished: dict[str, int] = msgspec.field(default_factory=dict)
    """Finished requests by reason: stop, length, abort, error."""
