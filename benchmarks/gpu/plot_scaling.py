"""Draws what `scaling.py --out` wrote.

    python benchmarks/gpu/plot_scaling.py scaling.json benchmarks/figures/scaling-llama8b.svg

Needs matplotlib.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    """Two panels: tokens/s against rows, and against the context."""
    source, target = map(Path, sys.argv[1:3])
    data = json.loads(source.read_text())
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    by_rows = [item for item in data["results"] if item["context"] == 256]
    by_context = [item for item in data["results"] if item["context"] > 256 and item["rows"] == 1]
    for panel, items, key, title in (
        (panels[0], by_rows, "rows", "context 256"),
        (panels[1], by_context, "context", "1 row"),
    ):
        x = [item[key] for item in items]
        panel.plot(
            x, [1e3 * item["rows"] / item["floor_ms"] for item in items], "--", color="grey", label="floor"
        )
        panel.plot(x, [1e3 * item["rows"] / item["ms"] for item in items], "o-", label="charonia")
        panel.set(xscale="log", xlabel=key, ylabel="tokens/s", title=f"{data['model']}, {title}")
        panel.set_xticks(x, [f"{value:,}" for value in x])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
