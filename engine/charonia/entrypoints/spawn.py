"""Child processes that end when this process does."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from charonia.entrypoints import exec_child
from charonia.entrypoints.launch_error import LaunchError


def spawn_tied(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path
) -> subprocess.Popen[bytes]:
    """Start `command` as the leader of a new session that the kernel kills when this process ends.

    Its output is appended to `log_path`. For the kernel a child's parent dies with the *thread* that started it. So a
    thread of its own does that, and lives exactly as long as the child. Raises `LaunchError`.
    """
    try:
        log = log_path.open("ab")
    except OSError as error:
        raise LaunchError(f"cannot write the log {log_path}: {error.strerror}") from None
    started: Future[subprocess.Popen[bytes]] = Future()
    helper = [sys.executable, "-I", "-S", str(exec_child.__file__), str(os.getpid())]

    def keep() -> None:
        try:
            with log:
                process = subprocess.Popen(
                    [*helper, *command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            started.set_exception(LaunchError(f"cannot start {command[0]}: {error}"))
            return
        started.set_result(process)
        process.wait()

    threading.Thread(target=keep, name="charonia-child-keeper", daemon=True).start()
    return started.result()
