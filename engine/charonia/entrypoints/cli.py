"""The `charonia` command: `serve`, `demo`, `bench`, `install-backend`, `fetch-model`."""

import argparse
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Sequence

from charonia.entrypoints.launch_error import LaunchError
from charonia.errors import CharoniaError

_COMMANDS = {
    "serve": ("charonia.entrypoints.serve", "serve a model in NVIDIA Triton, until Ctrl-C"),
    "demo": ("charonia.entrypoints.demo", "stream a chat answer to this terminal"),
    "bench": ("charonia.entrypoints.bench.command", "measure an engine, or a server that runs"),
    "install-backend": (
        "charonia.entrypoints.install_backend",
        'make an installed Triton serve repositories with `backend: "charonia"` or "vllm"',
    ),
    "fetch-model": (
        "charonia.entrypoints.fetch_model",
        "prepare the embedded default model, print where it is",
    ),
}
"""Name: the module with its `add_arguments(parser)` and `run(options) -> int`, imported on use, and its help."""

_INSTALL = "install it: pip install 'charonia[engine,server,client]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="charonia", description="Large language models inside NVIDIA Triton."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module_name, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == chosen:
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("charonia"):
                    raise
                print(f"charonia {name} needs the package {error.name}; {_INSTALL}", file=sys.stderr)
                return 1
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    verbose = bool(getattr(options, "verbose", False))
    try:
        return int(options.run(options))
    except CharoniaError as error:
        if verbose:
            traceback.print_exc()
        print(_error_text(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _error_text(error: CharoniaError) -> str:
    lines = [f"charonia: {error}"]
    if isinstance(error, LaunchError) and error.detail:
        lines = ["The server's log ends with:", *(f"  {line}" for line in error.detail.splitlines()), *lines]
    return "\n".join(lines)


def _version() -> str:
    try:
        return importlib.metadata.version("charonia")
    except importlib.metadata.PackageNotFoundError:  # a checkout on sys.path, not installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
