"""The Makefile calls commands with the flags that they have."""

import argparse
import importlib
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_commands_take_what_make_passes(command: str) -> None:
    recipe = subprocess.run(
        ["make", "-n", command], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (call,) = (line for line in recipe.replace("\\\n", " ").splitlines() if f"charonia {command}" in line)
    arguments = shlex.split(call.split(f"charonia {command}", 1)[1])
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"charonia.entrypoints.{command}").add_arguments(parser)
    options = parser.parse_args(arguments)
    assert options.http_port == 8000
