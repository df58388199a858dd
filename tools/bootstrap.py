"""Make and keep the development environment ``.venv``: standard library only, run by ``make setup``.

The environment is up to date when its stamp equals what the project asks for now: the requirements, the
constraints, the Python and the place of the repository. Then this ends within milliseconds; else pip brings
it up to date, and a change of Python, place or torch index builds it anew.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "setup-stamp.json"
LOG = VENV / "setup.log"
EXTRAS = "client,gateway,bench,tracing,engine,server,convert,dev"
BYTES_NEEDED = 3_000_000_000
GLIBC_NEEDED = (2, 35)
"""The server's wheel is built for manylinux_2_35."""

Stamp = dict[str, str]
_UNFINISHED = "unfinished"


class SetupError(Exception):
    """The environment cannot be made.

    Attributes:
        cause: what went wrong.
        mend: what the user can do about it.
    """

    def __init__(self, cause: str, mend: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.mend = mend


@dataclass(frozen=True)
class _PipFailure:
    """A failure that pip's output gives away."""

    pattern: str
    cause: str
    mend: str


_PIP_FAILURES = (
    _PipFailure(
        r"No space left on device|Errno 28\b",
        "the disk filled up",
        f"free some space: {BYTES_NEEDED / 1e9:.0f} GB with a CPU build of torch, about 10 GB with a CUDA "
        "build (see TORCH_INDEX in 'make help')",
    ),
    _PipFailure(
        r"NewConnectionError|ConnectTimeout|ReadTimeout|Max retries exceeded|Name or service not known"
        r"|Temporary failure in name resolution|Network is unreachable|ProxyError"
        r"|Connection (?:refused|reset)",
        "the package index cannot be reached",
        "check the network, the proxy and pip's configuration (pip config list)",
    ),
    _PipFailure(
        r"No matching distribution found|is not a supported wheel on this platform",
        "the package index has no wheel of a package for this platform and Python",
        "check which index pip uses (pip config list), or set PYTHON= to the other of Python 3.11 and 3.12",
    ),
    _PipFailure(
        r"Permission denied|Read-only file system",
        "a file or directory cannot be written",
        f"make {ROOT} and the temporary directory writable for this user",
    ),
)


def main() -> int:
    """Bring the environment up to date; 0 on success, 1 with cause and mend on standard error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch-index", default="", help="an extra package index that has the torch build to use"
    )
    options = parser.parse_args()
    try:
        ensure_environment(options.torch_index)
    except SetupError as error:
        print(f"error: {error.cause}\n  mend: {error.mend}", file=sys.stderr)
        return 1
    return 0


def ensure_environment(torch_index: str) -> None:
    """Make ``.venv`` what the project asks for, doing only what is missing.

    Args:
        torch_index: a package index to take torch from as well; empty keeps whichever was used before.

    Raises:
        SetupError: an unfit platform, no disk space, no network, a package without a wheel.
    """
    if _is_current(torch_index):
        return
    with _exclusive():
        if _is_current(torch_index):
            return
        _require_platform()
        _require_space()
        installed = _installed_stamp()
        torch_index = torch_index or installed.get("torch_index", "")
        wanted = _wanted_stamp(torch_index)
        if not _can_update(installed, wanted):
            _create_venv()
        _write_stamp(wanted | {"requirements": _UNFINISHED})
        _install(torch_index)
        _write_stamp(wanted)
        print(f"Environment ready: {VENV}", flush=True)


def _wanted_stamp(torch_index: str) -> Stamp:
    """What an up-to-date environment was made from; settings of linters and tests do not count."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    installed_from = {key: project[key] for key in ("build-system", "project")} | {
        "hatch": project["tool"]["hatch"]
    }
    digest = hashlib.sha256(json.dumps(installed_from, sort_keys=True).encode())
    digest.update((ROOT / "constraints.txt").read_bytes())
    return {
        "requirements": f"{digest.hexdigest()} [{EXTRAS}]",
        "python": platform.python_version(),
        "root": str(ROOT),
        "torch_index": torch_index,
    }


def _installed_stamp() -> Stamp:
    """The stamp of the environment as it is; empty where there is none."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(stamp: Stamp) -> None:
    STAMP.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _is_current(torch_index: str) -> bool:
    installed = _installed_stamp()
    wanted = _wanted_stamp(torch_index or installed.get("torch_index", ""))
    return installed == wanted and _venv_version() == wanted["python"]


def _venv_version() -> str:
    """The version of the environment's Python; empty where that or its pip does not work (any more)."""
    if Path(sys.prefix) == VENV:
        return platform.python_version() if importlib.util.find_spec("pip") else ""
    program = "import pip, platform; print(platform.python_version())"
    command = [str(VENV / "bin" / "python"), "-I", "-c", program]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _can_update(installed: Stamp, wanted: Stamp) -> bool:
    """Whether pip can bring the environment to ``wanted`` in place; one without a stamp was made by hand."""
    if installed.get("requirements") == _UNFINISHED:
        return False
    kept = all(installed.get(key, wanted[key]) == wanted[key] for key in ("root", "torch_index"))
    return kept and _venv_version() == wanted["python"]


def _require_platform() -> None:
    libc, version = platform.libc_ver()
    found = f"{platform.system()} {platform.machine()}, {libc or 'no glibc'} {version}".strip()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if (platform.system(), platform.machine(), libc) != (
        "Linux",
        "x86_64",
        "glibc",
    ) or numbers < GLIBC_NEEDED:
        raise SetupError(
            f"the Triton server's wheel runs on Linux x86_64 with glibc 2.35 or newer, and this is {found}",
            "use such a machine (Debian 12, Ubuntu 22.04 and later), or a container of one",
        )


def _require_space() -> None:
    free = shutil.disk_usage(ROOT).free
    if free < BYTES_NEEDED:
        raise SetupError(
            f"{ROOT} has {free / 1e9:.1f} GB of free disk space, {BYTES_NEEDED / 1e9:.0f} GB are needed",
            "free some space (10 GB in all where torch comes as a CUDA build), or clone to a larger disk",
        )


@contextmanager
def _exclusive() -> Iterator[None]:
    """One set-up of this clone at a time; the kernel drops the lock when its holder ends."""
    with (ROOT / "pyproject.toml").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another 'make' that sets up this clone", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create_venv() -> None:
    # Inside the environment that is to be replaced, the Python it was made from takes over.
    python = getattr(sys, "_base_executable", sys.executable)
    print(f"Creating {VENV} with Python {platform.python_version()} ({python})", flush=True)
    made = subprocess.run(
        [python, "-I", "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        output = (made.stdout + made.stderr).strip()
        _diagnose(output)
        raise SetupError(
            f"{python} -m venv failed: {output}",
            "install its venv module (Debian, Ubuntu: apt install python3-venv), or set PYTHON=/another",
        )


def _install(torch_index: str) -> None:
    """Run pip; show the large downloads as they start and keep everything it says in a log."""
    print("Installing the packages pinned in constraints.txt (several minutes the first time)", flush=True)
    command = [
        str(VENV / "bin" / "python"),
        "-I",
        "-m",
        "pip",
        "install",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--progress-bar", "off", "--constraint", str(ROOT / "constraints.txt")]
    command += ["--extra-index-url", torch_index] if torch_index else []
    command += ["--editable", f"{ROOT}[{EXTRAS}]"]
    # A user-wide default of `pip install --user` does not fit an environment.
    environment = os.environ | {"PIP_USER": "0"}
    with (
        LOG.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            log.flush()
            if shown := _headline(line):
                print(f"  {shown}", flush=True)
    if pip.returncode != 0:
        output = LOG.read_text(encoding="utf-8")
        _diagnose(output)
        last_lines = "\n".join(f"  | {line}" for line in output.splitlines()[-12:])
        raise SetupError(
            f"pip failed with status {pip.returncode}:\n{last_lines}", f"see the whole log, {LOG}"
        )


def _headline(line: str) -> str:
    """What of a line of pip's output is worth showing; empty for most."""
    if re.match(r"\s*Downloading .*\([\d.]+ [MG]B\)", line):
        return line.strip()
    if line.startswith("Installing collected packages:"):
        return f"Installing {line.count(',') + 1} packages"
    return ""


def _diagnose(output: str) -> None:
    """Raise the failure that ``output`` tells of, if it is a known one."""
    for failure in _PIP_FAILURES:
        if found := re.search(f".*(?:{failure.pattern}).*", output):
            raise SetupError(f"{failure.cause} ({found.group().strip()[:200]})", failure.mend)


if __name__ == "__main__":
    sys.exit(main())
