"""`charonia bench throughput|latency|steps`: the command line."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from charonia.entrypoints.bench import latency, steps, throughput
from charonia.entrypoints.engine_flags import add_engine_flags, engine_settings
from charonia.entrypoints.fetch_model import prepare_default_model
from charonia.entrypoints.progress import Progress

_KINDS = {
    "throughput": (throughput, "a batch of requests, all at once"),
    "latency": (latency, "one small batch after the other"),
    "steps": (steps, "where the time of a decode step goes, by the number of rows"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `charonia bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (module, text) in _KINDS.items():
        kind = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        kind.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="local Hugging Face model directory (default: the embedded model)",
        )
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
        module.add_arguments(kind)
        add_engine_flags(kind)
        kind.set_defaults(measure=module.measure)


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns 0."""
    measure: Callable[[str, dict[str, Any], argparse.Namespace], dict[str, Any]] = options.measure
    model = options.model or str(prepare_default_model(Progress(sys.stderr)))
    settings = {"skip_tokenizer_init": True, **engine_settings(options)}
    figures = measure(model, settings, options)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0
