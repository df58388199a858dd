"""A picture of a sweep; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from charonia.entrypoints.bench.serve.report import Point

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_PERCENTILES = (("p50", "-", "o"), ("p99", "--", "s"))


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Throughput, and beside it TTFT, ITL and end-to-end latency, against the load. The suffix of the path decides the
    format.
    """
    labels, axis = _labels(points)
    figure, panels = plt.subplots(1, 4, figsize=(18, 4.2))
    x = list(range(len(points)))
    panels[0].plot(x, [point.summary.output_throughput for point in points], "o-", label="output tokens/s")
    panels[0].set(ylabel="output tokens/s", title="throughput")
    panels[0].set_ylim(bottom=0)
    if any(point.summary.goodput is not None for point in points):
        requests = panels[0].twinx()
        requests.plot(
            x, [point.summary.request_throughput for point in points], "^:", color="grey", label="requests/s"
        )
        requests.plot(
            x, [point.summary.goodput or 0 for point in points], "v-", color="tab:green", label="goodput"
        )
        requests.set_ylim(bottom=0)
        requests.set_ylabel("requests/s")
        requests.legend(loc="lower right")
    for panel, (name, text) in zip(
        panels[1:], (("ttft", "TTFT"), ("itl", "inter-token latency"), ("e2el", "end to end")), strict=True
    ):
        _latency(panel, points, name)
        panel.set(ylabel="ms", title=text)
    for panel in panels:
        panel.set_xlabel(axis)
        panel.set_xticks(x, labels)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _labels(points: Sequence[Point]) -> tuple[list[str], str]:
    """Loads are evenly spaced, as they are usually powers of two, and may be infinite."""
    if all(point.load.is_closed_loop for point in points):
        return [str(point.load.concurrency or "all") for point in points], "concurrent requests"
    return [f"{point.load.rate:g}" for point in points], "requests/s offered"


def _latency(panel: Axes, points: Sequence[Point], name: str) -> None:
    for percentile, line, marker in _PERCENTILES:
        values = [getattr(point.summary, name) for point in points]
        y = [float("nan") if value is None else getattr(value, percentile) for value in values]
        panel.plot(range(len(points)), y, line, marker=marker, label=percentile)
    panel.set_ylim(bottom=0)
    panel.legend()
