"""`charonia bench serve`: the whole measurement."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from charonia.entrypoints.bench.serve import options as flags
from charonia.entrypoints.bench.serve.arrivals import Load, arrival_times
from charonia.entrypoints.bench.serve.driver import Fleet, Outcome, Run, fleet
from charonia.entrypoints.bench.serve.options import add_arguments
from charonia.entrypoints.bench.serve.records import Records
from charonia.entrypoints.bench.serve.report import Point, point_json, point_text, sweep_text
from charonia.entrypoints.bench.serve.server_metrics import ServerMetrics
from charonia.entrypoints.bench.serve.summary import summarise
from charonia.errors import ConfigError

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """Measure every load and print it; returns 0, 1 if a run had no success, or 130 after Ctrl-C, when what was
    measured so far is reported all the same.
    """
    flags.check(options)
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'charonia[bench]'")
    target = flags.target(options)
    measurement = Measurement(options)
    points: list[Point] = []
    requests_file = None if options.requests is None else options.requests.open("w")
    try:
        with fleet(target, options.workers) as workers:
            for i, load in enumerate(flags.loads(options)):
                point, records = measurement.measure(workers, load, i)
                points.append(point)
                print(point_text(point), flush=True)
                if requests_file is not None:
                    _write_requests(requests_file, load, records)
                if point.interrupted:
                    break
    finally:
        if requests_file is not None:
            requests_file.close()
        _report(points, options)
    if any(point.interrupted for point in points):
        return 130
    return 0 if all(point.summary.completed for point in points) else 1


class Measurement:
    """Makes each run from the flags, and a point from what it gave."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._workload, self._warm_up = flags.workloads(options)
        self._metrics = None if options.metrics_url is None else ServerMetrics(options.metrics_url)

    def measure(self, workers: Fleet, load: Load, number: int) -> tuple[Point, Records]:
        """One run. number: of the run; each has random prompts of its own."""
        options, metrics = self._options, self._metrics
        rng = np.random.default_rng([options.seed, number])
        count = flags.num_prompts(options, load)
        warmups = options.workers if options.num_warmups is None else options.num_warmups
        run = Run(
            load,
            self._workload.requests(rng, count),
            arrival_times(rng, count, load.rate, options.burstiness),
            self._warm_up.requests(rng, warmups),
        )
        with tqdm(
            total=count, desc=load.label, unit="req", disable=None, leave=False, file=sys.stderr
        ) as bar:

            def on_progress(ended: int) -> None:
                bar.update(ended - bar.n)
                if metrics is not None:
                    metrics.sample()

            outcome = workers.run(run, lambda: metrics.begin() if metrics else None, on_progress)
        return self._point(load, outcome, None if metrics is None else metrics.end()), outcome.records

    def _point(self, load: Load, outcome: Outcome, server: dict[str, float] | None) -> Point:
        summary = summarise(outcome.records, dict(self._options.goodput))
        return Point(
            load=load,
            summary=summary,
            generator_busy=outcome.busiest,
            generator_us=sum(outcome.cpu_s) * 1e6 / max(1, summary.num_responses),
            generator_late_ms=outcome.late_ms,
            interrupted=outcome.interrupted,
            server=server,
        )


def _report(points: Sequence[Point], options: argparse.Namespace) -> None:
    if len(points) > 1:
        print(f"\n{sweep_text(points)}")
    if options.json is not None:
        figures = {"options": flags.described(options), "runs": [point_json(point) for point in points]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot is not None and points:
        _plot(points, options)


def _plot(points: Sequence[Point], options: argparse.Namespace) -> None:
    # Loaded late: matplotlib is optional, and slow to import.
    plot = importlib.import_module("charonia.entrypoints.bench.serve.plot")
    workload = (
        options.dataset.name if options.dataset else f"{options.input_len} + {options.output_len} tokens"
    )
    plot.draw(points, f"{options.model}, {workload}, {options.backend}", Path(options.plot))


def _write_requests(file: TextIO, load: Load, records: Records) -> None:
    """One line a request; seconds since the start of its run."""
    ends = np.cumsum(records.responses)
    for i in np.argsort(records.index, kind="stable"):
        own = slice(int(ends[i] - records.responses[i]), int(ends[i]))
        line: dict[str, Any] = {
            "load": load.label,
            "index": int(records.index[i]),
            "scheduled_s": records.scheduled[i],
            "sent_s": records.sent[i],
            "prompt_tokens": int(records.prompt_tokens[i]),
            "output_tokens": int(records.output_tokens[i]),
            "error": records.errors[i],
            "response_times_s": records.times[own].tolist(),
            "response_tokens": records.tokens[own].tolist(),
        }
        file.write(json.dumps(line) + "\n")
