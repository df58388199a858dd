"""What a frontend counts of requests that have ended."""

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

from charonia.triton.request_record import RequestRecord

_MAX_WAITING = 8192
"""Most requests of which measurements wait to be taken; the oldest are forgotten past it."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that ended well. Seconds and tokens."""

    total: float
    decode: float
    num_prompt_tokens: int
    num_generation_tokens: int
    num_sequences: int


@dataclass(slots=True)
class RequestCounts:
    """What has ended since the counts were taken last: refused requests by error code, the rest by outcome."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    completions: deque[Completion] = field(default_factory=lambda: deque(maxlen=_MAX_WAITING))


class RequestCounters:
    """Counts requests as they end. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RequestCounts()

    def note(self, record: RequestRecord) -> None:
        """A request has ended."""
        with self._lock:
            counts = self._counts
            if record.error is None:
                counts.outcomes[record.outcome] += 1
                counts.completions.append(
                    Completion(
                        record.total_seconds,
                        record.decode_seconds,
                        record.num_prompt_tokens,
                        record.num_generation_tokens,
                        record.num_sequences,
                    )
                )
            elif record.refused:
                counts.refused[record.error.code.value] += 1
            else:
                counts.outcomes[record.outcome] += 1

    def take(self) -> RequestCounts:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, RequestCounts()
        return counts
