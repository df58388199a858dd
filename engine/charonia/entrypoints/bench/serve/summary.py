"""From the records of a run to the figures that describe it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from charonia.entrypoints.bench.serve.records import Floats, Records

GOODPUT_NAMES = ("ttft", "tpot", "e2el")
_MAX_ERRORS = 20


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds; percentiles are interpolated between neighbours. count: how many values there are."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Floats) -> "Distribution | None":
        """None without values."""
        if not len(seconds):
            return None
        p50, p90, p95, p99 = (float(value) for value in np.percentile(seconds * 1e3, (50, 90, 95, 99)))
        return cls(len(seconds), float(seconds.mean() * 1e3), p50, p90, p95, p99, float(seconds.max() * 1e3))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Tokens and latencies are those of successful requests.

    duration_s: from the start to the end of the last request. goodput: requests a second that met every limit.
    mean_concurrency: successful requests in flight on average. tokens_per_response: 1 where each token comes alone.
    ttft: from sending to the first tokens. itl: between one response and the next. tpot: a request's time from first
    to last response, over its output tokens but one. e2el: from sending to the last tokens.
    send_delay: from when a request was due to when it was sent; it shows a generator that cannot keep up, or, under a
    limit of concurrency, the wait for others.
    """

    duration_s: float
    completed: int
    failed: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float | None
    mean_concurrency: float
    num_responses: int
    tokens_per_response: float
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2el: Distribution | None
    send_delay: Distribution | None


@dataclass(frozen=True, slots=True, eq=False)
class RequestTimes:
    """Seconds of each successful request [M]; tpot is NaN for single tokens. itl: of all of them together."""

    ttft: Floats
    tpot: Floats
    e2el: Floats
    itl: Floats

    @classmethod
    def of(cls, records: Records, ok: npt.NDArray[np.bool_]) -> "RequestTimes":
        """Only the requests in `ok`, which have responses."""
        counts = records.responses[ok]
        times = records.times[np.repeat(ok, records.responses)]
        ends = np.cumsum(counts)
        first, last, sent = times[ends - counts], times[ends - 1], records.sent[ok]
        gaps = np.diff(times)
        within = np.ones(len(gaps), bool)
        within[ends[:-1] - 1] = False
        tokens = records.output_tokens[ok]
        tpot = np.where(tokens > 1, (last - first) / np.maximum(tokens - 1, 1), np.nan)
        return cls(first - sent, tpot, last - sent, gaps[within])


def summarise(records: Records, goodput: Mapping[str, float]) -> Summary:
    """Figures of a run. goodput: limits in milliseconds by name, of `GOODPUT_NAMES`; a request of one token meets any
    limit on tpot.
    """
    ok = np.array([error is None for error in records.errors], bool)
    times = RequestTimes.of(records, ok)
    duration = float(records.ended.max()) if len(records) else 0.0
    scale = 1.0 / duration if duration > 0 else 0.0
    completed, prompt, output = (
        int(ok.sum()),
        int(records.prompt_tokens[ok].sum()),
        int(records.output_tokens[ok].sum()),
    )
    responses = int(records.responses[ok].sum())
    met = np.ones(completed, bool)
    for name, limit in goodput.items():
        met &= ~(getattr(times, name) * 1e3 > limit)
    return Summary(
        duration_s=duration,
        completed=completed,
        failed=len(records) - completed,
        errors=dict(Counter(error for error in records.errors if error is not None).most_common(_MAX_ERRORS)),
        prompt_tokens=prompt,
        output_tokens=output,
        request_throughput=completed * scale,
        output_throughput=output * scale,
        total_throughput=(prompt + output) * scale,
        goodput=int(met.sum()) * scale if goodput else None,
        mean_concurrency=float(times.e2el.sum()) * scale,
        num_responses=responses,
        tokens_per_response=output / responses if responses else 0.0,
        ttft=Distribution.of(times.ttft),
        itl=Distribution.of(times.itl),
        tpot=Distribution.of(times.tpot[~np.isnan(times.tpot)]),
        e2el=Distribution.of(times.e2el),
        send_delay=Distribution.of(records.sent - records.scheduled),
    )
