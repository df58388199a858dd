"""The private folder that holds a model's sockets."""

import hashlib
import os
import shutil
import stat
from pathlib import Path

from charonia.errors import ConfigError

MAX_RUNTIME_DIR_BYTES = 80
"""Names of unix sockets end at 107 bytes; the rest is for the names inside the folder."""


def make_runtime_dir(base: Path | None, *, server_pid: int, model: str, tmp: Path = Path("/tmp")) -> Path:
    """The folder shared by all instances of one model of one server; made if need be, with mode 0700.

    base: the folder that the model's configuration names, or None for `/tmp/charonia-<uid>/<server pid>`; folders there
    of servers that run no more are cleared away. model: what tells the model from others of the same server. Raises
    `ConfigError` when the folder is not private to this user: whoever can write to it can take the engine's place.
    """
    if base is None:
        home = tmp / f"charonia-{os.getuid()}"
        _make_private(home)
        _remove_dead(home)
        base = home / str(server_pid)
    elif not base.is_absolute():
        raise ConfigError(f"model parameter 'runtime_dir' must be an absolute path, got {str(base)!r}")
    folder = base / hashlib.sha256(model.encode()).hexdigest()[:12]
    if len(os.fsencode(folder)) > MAX_RUNTIME_DIR_BYTES:
        raise ConfigError(
            f"the runtime folder {str(folder)!r} is too long a name for unix sockets: at most "
            f"{MAX_RUNTIME_DIR_BYTES} bytes; set the model parameter 'runtime_dir' to a shorter one"
        )
    _make_private(base)
    _make_private(folder)
    return folder


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"cannot make the runtime folder {str(folder)!r}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"the runtime folder {str(folder)!r} must be a directory of this user alone (mode 0700); remove it, or "
            f"set the model parameter 'runtime_dir'"
        )


def _remove_dead(home: Path) -> None:
    """Remove what servers that no longer run have left."""
    for path in home.iterdir():
        if path.name.isdecimal() and not Path("/proc", path.name).exists():
            shutil.rmtree(path, ignore_errors=True)
