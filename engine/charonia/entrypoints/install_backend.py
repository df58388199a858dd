"""`charonia install-backend`: Charonia as a Python-based backend of an installed Triton server."""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.repository import find_template

BACKEND = "charonia"
VLLM_BACKEND = "vllm"

_PYTHON_BACKEND = Path("python", "libtriton_python.so")
_MODEL = "model.py"
_OURS = "from charonia.triton.backend import TritonBackend"
"""A line by which a `model.py` is known for ours."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `charonia install-backend`."""
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="the server's backends, such as /opt/tritonserver/backends",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="install under this name alone; may be repeated (default: charonia, and vllm where DIR has none)",
    )
    parser.add_argument("--force", action="store_true", help="replace another backend of that name")


def run(options: argparse.Namespace) -> int:
    """Install and print what is there now; returns 0. Raises `LaunchError` where it cannot be done."""
    directory = options.directory.expanduser()
    names = options.name or default_names(directory)
    for folder in install_backend(directory, names, replace=options.force):
        print(f'{folder}: serves models with `backend: "{folder.name}"`')
    if not options.name and VLLM_BACKEND not in names:
        print(f"{directory / VLLM_BACKEND} is another backend and stays; --name vllm --force replaces it")
    if not (directory / _PYTHON_BACKEND).is_file():
        print(f"Beware: the server also needs Triton's Python backend, {directory / _PYTHON_BACKEND}")
    return 0


def default_names(directory: Path) -> list[str]:
    """Our own name, and vLLM's unless another backend has it."""
    return [BACKEND, *([VLLM_BACKEND] if _is_free(directory / VLLM_BACKEND) else [])]


def install_backend(directory: Path, names: Sequence[str], *, replace: bool = False) -> list[Path]:
    """Write `directory/<name>/model.py` for each name, over earlier installations of ours.

    Args:
        directory: the server's backends; it must be there.
        names: what `backend` says in config.pbtxt.
        replace: also take the place of other backends.

    Returns:
        The backends' folders.

    Raises:
        LaunchError: a name is taken or unfit, or the folder cannot be written; nothing is written in the first case.
    """
    if not directory.is_dir():
        raise LaunchError(f"{directory}: no such directory", "Name the folder that holds Triton's backends.")
    for name in names:
        if not _NAME.fullmatch(name):
            raise LaunchError(f"--name {name!r} may only hold small letters, digits, '_' and '-'")
        if name == "python":
            raise LaunchError("--name python: Charonia runs by that backend and cannot replace it")
        if not replace and not _is_free(directory / name):
            raise LaunchError(f"{directory / name} is another backend", "Replace it with --force.")
    source = find_template() / "1" / _MODEL
    try:
        return [_install(source, directory / name) for name in names]
    except OSError as error:
        raise LaunchError(f"cannot write to {directory}: {error}") from None


def _is_free(folder: Path) -> bool:
    """Whether there is nothing, or an installation of ours."""
    if not folder.is_symlink() and not folder.exists():
        return True
    try:
        return _OURS in (folder / _MODEL).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _install(source: Path, folder: Path) -> Path:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir()
    shutil.copyfile(source, folder / _MODEL)
    return folder
