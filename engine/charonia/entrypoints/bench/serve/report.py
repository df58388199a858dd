"""What a person reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from charonia.entrypoints.bench.serve.arrivals import Load
from charonia.entrypoints.bench.serve.summary import Distribution, Summary

_LATENCIES = (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("E2E", "e2el"))
_BUSY = 0.8
_LATE_MS = 5.0


@dataclass(frozen=True, slots=True)
class Point:
    """One run.

    generator_busy: share of its time that the busiest generating process computed. generator_us: processor time a
    response. generator_late_ms: how late one of them woke up, at the 99th percentile. server: figures from the server's
    metrics, if they were read.
    """

    load: Load
    summary: Summary
    generator_busy: float
    generator_us: float
    generator_late_ms: float
    interrupted: bool
    server: dict[str, float] | None


def point_text(point: Point) -> str:
    """All figures of one run."""
    run = point.summary
    failed = f", {run.failed} failed" if run.failed else ""
    interrupted = ", interrupted" if point.interrupted else ""
    throughputs = (
        f"{run.request_throughput:,.2f} requests/s",
        f"{run.output_throughput:,.1f} output tokens/s",
        f"{run.total_throughput:,.1f} tokens/s in all",
    )
    tokens = (
        f"{run.prompt_tokens:,} in",
        f"{run.output_tokens:,} out",
        f"{run.tokens_per_response:.2f} a response; {run.mean_concurrency:.1f} requests in flight on average",
    )
    lines = [
        f"{point.load.label}: {run.completed} requests in {run.duration_s:.2f} s{failed}{interrupted}",
        f"  {'throughput':<15}  {', '.join(throughputs)}",
        f"  {'tokens':<15}  {', '.join(tokens)}",
    ]
    if run.goodput is not None:
        lines.append(f"  {'goodput':<15}  {run.goodput:,.2f} requests/s")
    names = ("mean", "p50", "p90", "p95", "p99", "max")
    if run.completed:
        lines.append(f"  {'milliseconds':<15}" + "".join(f"{name:>10}" for name in names))
    for title, name in _LATENCIES:
        values: Distribution | None = getattr(run, name)
        if values is not None:
            lines.append(f"  {title:<15}" + "".join(f"{getattr(values, each):>10.2f}" for each in names))
    lines += [f"  {count} x {error}" for error, count in run.errors.items()]
    if point.server:
        lines += [f"  server {name:<40} {value:,.6g}" for name, value in point.server.items()]
    return "\n".join([*lines, *(f"  warning: {text}" for text in warnings(point))])


def warnings(point: Point) -> list[str]:
    """Why the figures may tell of the generator and not of the server."""
    found = []
    if point.generator_busy > _BUSY:
        found.append(f"a load generator was busy for {point.generator_busy:.0%} of the time; raise --workers")
    if point.generator_late_ms > _LATE_MS:
        found.append(
            f"a load generator woke up {point.generator_late_ms:.1f} ms late at the 99th percentile and read the clock "
            "as late: the machine has too few cores for all that runs"
        )
    delay = point.summary.send_delay
    is_open_loop = point.load.concurrency is None and not point.load.is_closed_loop
    if is_open_loop and delay is not None and delay.p99 > _LATE_MS:
        found.append(
            f"requests were sent late, by {delay.p99:.1f} ms at the 99th percentile; raise --workers"
        )
    return found


def sweep_text(points: Sequence[Point]) -> str:
    """One row a run."""
    header = ["load", "done", "failed", "req/s", "out tok/s", "tok/s"]
    header += [f"{title} {each}" for title, _ in _LATENCIES for each in ("p50", "p99")]
    with_goodput = any(point.summary.goodput is not None for point in points)
    rows = [[*header, *(["goodput"] if with_goodput else [])]]
    for point in points:
        run = point.summary
        row = [point.load.label, str(run.completed), str(run.failed)]
        row += [
            f"{run.request_throughput:.2f}",
            f"{run.output_throughput:.1f}",
            f"{run.total_throughput:.1f}",
        ]
        for _, name in _LATENCIES:
            values: Distribution | None = getattr(run, name)
            row += ["-", "-"] if values is None else [f"{values.p50:.2f}", f"{values.p99:.2f}"]
        rows.append([*row, *([f"{run.goodput or 0:.2f}"] if with_goodput else [])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "latencies in milliseconds"])


def point_json(point: Point) -> dict[str, Any]:
    """As JSON holds it; an infinite rate is the string `inf`."""
    from_summary = {name: _plain(getattr(point.summary, name)) for name in Summary.__dataclass_fields__}
    return {
        "concurrency": point.load.concurrency,
        "request_rate": "inf" if point.load.is_closed_loop else point.load.rate,
        **from_summary,
        "generator_busy": point.generator_busy,
        "generator_us_per_response": point.generator_us,
        "generator_late_ms": point.generator_late_ms,
        "interrupted": point.interrupted,
        "server": point.server,
        "warnings": warnings(point),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Distribution):
        return {name: getattr(value, name) for name in Distribution.__dataclass_fields__}
    return value
