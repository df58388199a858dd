"""`charonia bench throughput|latency|steps|serve`: the command line."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from charonia.entrypoints.engine_flags import add_engine_flags, engine_settings
from charonia.entrypoints.fetch_model import prepare_default_model
from charonia.entrypoints.progress import Progress

_OFFLINE = {
    "throughput": "a batch of requests, all at once",
    "latency": "one small batch after the other",
    "steps": "where the time of a decode step goes, by the number of rows",
}
_SERVE = "a running server under load: throughput and latencies by concurrency or request rate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `charonia bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_KindParser)
    for name, text in _OFFLINE.items():
        kinds.add_parser(
            name, declare=_declare_offline, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
    kinds.add_parser(
        "serve", declare=_declare_serve, help=_SERVE, description=f"{_SERVE[0].upper()}{_SERVE[1:]}."
    )


class _KindParser(argparse.ArgumentParser):
    """Declares its flags when it is chosen: the offline kinds import torch, and `serve` needs no engine at all."""

    def __init__(self, *, declare: "Callable[[str, argparse.ArgumentParser], None]", **keywords: Any) -> None:
        super().__init__(**keywords)
        self._declare = declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Declare, then parse; argparse calls it once, for the chosen kind."""
        name = self.prog.split()[-1]
        try:
            self._declare(name, self)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("charonia"):
                raise
            extra = "bench" if name == "serve" else "engine"
            self.exit(1, f"{self.prog} needs the package {error.name}: pip install 'charonia[{extra}]'\n")
        return super().parse_known_args(args, namespace)


def _declare_serve(name: str, kind: argparse.ArgumentParser) -> None:
    module = importlib.import_module("charonia.entrypoints.bench.serve.command")
    module.add_arguments(kind)
    kind.set_defaults(measure=module.run)


def _declare_offline(name: str, kind: argparse.ArgumentParser) -> None:
    module = importlib.import_module(f"charonia.entrypoints.bench.{name}")
    kind.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local Hugging Face model directory (default: the embedded model)",
    )
    kind.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    module.add_arguments(kind)
    add_engine_flags(kind)
    kind.set_defaults(measure=lambda options: _run_offline(module.measure, options))


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    measure: Callable[[argparse.Namespace], int] = options.measure
    return measure(options)


def _run_offline(
    measure: Callable[[str, dict[str, Any], argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> int:
    model = options.model or str(prepare_default_model(Progress(sys.stderr)))
    settings = {"skip_tokenizer_init": True, **engine_settings(options)}
    figures = measure(model, settings, options)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0
