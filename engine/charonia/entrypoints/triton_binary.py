"""Finds a Triton server: a path given by the user, `tritonserver` on PATH, or the server wheel's."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from charonia.entrypoints.launch_error import LaunchError

_INSTALL = "pip install 'charonia[server]'"
_PYTHON_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class TritonBinary:
    """A server binary, and what must be arranged around it."""

    path: Path
    """The executable."""
    wheel_root: Path | None = None
    """The `tritonserver` folder of the nvidia-pytriton wheel, where that is its home; None for a full
    installation, which finds its own backends and libraries."""

    def prepare(self, folder: Path) -> list[str]:
        """Build what the server needs below `folder`; returns the arguments that point it there.

        Raises `LaunchError` where this Python or its numpy cannot work with the server.
        """
        if self.wheel_root is None:
            return []
        _check_numpy()
        home = folder / "backends" / "python"
        home.mkdir(parents=True)
        stubs = self.wheel_root / "python_backend_stubs"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        files = [self.wheel_root / "backends" / "python" / name for name in _PYTHON_BACKEND_FILES]
        files.append(stubs / version / _STUB)
        for file in files:
            if not file.is_file():
                offered = ", ".join(sorted(entry.name for entry in stubs.iterdir()))
                raise LaunchError(
                    f"the Triton server in {self.wheel_root} has no {file.name} for Python {version}; "
                    f"it serves {offered}",
                    "Use one of those versions of Python, or name another server with --server PATH.",
                )
            (home / file.name).symlink_to(file)
        return [f"--backend-directory={home.parent}", f"--cache-directory={self.wheel_root / 'caches'}"]

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base`, changed so that the stubs run this very Python (they take `python3` from PATH)."""
        environment = dict(base)
        interpreter_dir = str(Path(sys.executable).parent)
        environment["PATH"] = os.pathsep.join([interpreter_dir, base.get("PATH", os.defpath)])
        if self.wheel_root is not None:
            libraries = [str(self.wheel_root.parent.parent / "nvidia_pytriton.libs")]
            if library_dir := sysconfig.get_config_var("LIBDIR"):
                libraries.append(str(library_dir))
            if inherited := base.get("LD_LIBRARY_PATH"):
                libraries.append(inherited)
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        return environment


def _check_numpy() -> None:
    """The wheel's stubs were built against numpy 1: with numpy 2 they misread every string tensor and die."""
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError("numpy is not installed", "Install it: pip install 'numpy<2'") from None
    if int(version.partition(".")[0]) >= 2:
        raise LaunchError(
            f"numpy {version} is installed, and the Python backend of this Triton server needs numpy < 2",
            "Run: pip install 'numpy<2' (1.26.4 works), or name a newer server with --server PATH.",
        )


def find_server(given: str | Path | None = None) -> TritonBinary:
    """Find the server binary.

    Args:
        given: the binary, or the folder of an installation (`/opt/tritonserver`); None to look for one.

    Raises:
        LaunchError: there is none; the message says where was looked and what to install.
    """
    if given is not None:
        return _given_server(Path(given).expanduser())
    if found := shutil.which("tritonserver"):
        return _at(Path(found))
    if (root := _wheel_root()) is not None and os.access(root / "bin" / "tritonserver", os.X_OK):
        return TritonBinary(root / "bin" / "tritonserver", root)
    raise LaunchError(
        "no Triton server found: no --server PATH given, no tritonserver on PATH, no nvidia-pytriton package",
        f"Install one: {_INSTALL} (Linux on x86-64 or arm64, Python 3.11 or 3.12), "
        "or run inside an nvcr.io/nvidia/tritonserver container.",
    )


def _given_server(given: Path) -> TritonBinary:
    candidates = [given / "bin" / "tritonserver", given / "tritonserver"] if given.is_dir() else [given]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return _at(candidate)
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise LaunchError(
        f"--server {given}: no executable {looked}", "Name the tritonserver binary or its folder."
    )


def _at(binary: Path) -> TritonBinary:
    """The binary with its surroundings, told from the layout of the files around it."""
    root = binary.resolve().parent.parent
    return TritonBinary(binary.absolute(), root if (root / "python_backend_stubs").is_dir() else None)


def _wheel_root() -> Path | None:
    """The wheel's `tritonserver` folder, found without importing the package."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "tritonserver"
