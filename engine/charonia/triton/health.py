"""Is the model ready, and is the server about to end?"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

_CHECK_PERIOD_S = 0.5
_LOOK_PERIOD_S = 1.0
_DEFAULT_EXIT_TIMEOUT_S = 30.0
_EXIT_MARGIN_S = 5.0
_LISTEN = "0A"


class ServerExit:
    """Tells that the server is shutting down, which no interface of the stub does.

    On SIGTERM the server stops listening for HTTP at once, but calls `finalize()` only when every request has ended; it
    gives up when its exit timeout has passed, and then may hang until it is killed. (`pb_utils.is_model_ready` would
    tell, but blocks for ever with the interpreter's lock held when called during a shutdown.) So the listening sockets
    seen by the first requests are watched: when one closes, the server is on its way out. A server that serves gRPC
    alone keeps listening and is not noticed.

    server_pid: of the tritonserver process.
    """

    def __init__(self, server_pid: int, proc: Path = Path("/proc")) -> None:
        self._process = proc / str(server_pid)
        self._listeners: dict[Path, str] = {}
        self._settled = False
        self._next_look = 0.0

    def arm(self) -> None:
        """Note what the server listens on; call with every request.

        Requests of `model_warmup` come before the server listens, and the first client may come before it listens
        everywhere: so it is looked up again until it is the same twice, `_LOOK_PERIOD_S` apart.
        """
        if self._settled or time.monotonic() < self._next_look or self.seen:
            return
        found = self._find_listeners()
        self._settled = bool(found) and found == self._listeners
        self._listeners = found
        if found:
            self._next_look = time.monotonic() + _LOOK_PERIOD_S

    @property
    def seen(self) -> bool:
        """Whether a listening socket has closed since `arm`."""
        return any(_link(path) != target for path, target in self._listeners.items())

    def exit_timeout_s(self) -> float:
        """The server's `--exit-timeout-secs`."""
        try:
            arguments = (self._process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return _DEFAULT_EXIT_TIMEOUT_S
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
            name, _, value = argument.partition("=")
            if name == "--exit-timeout-secs":
                value = value or following
                return float(value) if value.isdecimal() else _DEFAULT_EXIT_TIMEOUT_S
        return _DEFAULT_EXIT_TIMEOUT_S

    def drain_timeout_s(self) -> float:
        """How long requests may go on once the server is exiting: within its exit timeout, with time to wind up."""
        timeout = self.exit_timeout_s()
        return max(timeout - _EXIT_MARGIN_S, timeout / 2)

    def _find_listeners(self) -> dict[Path, str]:
        listening: set[str] = set()
        try:
            for table in ("tcp", "tcp6"):
                lines = (self._process / "net" / table).read_text().splitlines()[1:]
                fields = [line.split() for line in lines]
                listening.update(f"socket:[{field[9]}]" for field in fields if field[3] == _LISTEN)
            links = {path: _link(path) for path in (self._process / "fd").iterdir()}
        except OSError:
            return {}
        return {path: target for path, target in links.items() if target in listening}


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


class DrainGuard:
    """Keeps requests that run on and on from outlasting the server's exit.

    Once the server is exiting, live requests have `drain_timeout_s` to finish; `abort_all` is called for the rest.
    """

    def __init__(
        self, server_exit: ServerExit, drain_timeout_s: float, abort_all: Callable[[], None]
    ) -> None:
        self._server_exit = server_exit
        self._drain_timeout_s = drain_timeout_s
        self._abort_all = abort_all
        self._stopped = threading.Event()
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="charonia-drain-guard", daemon=True)
        self._thread.start()

    @property
    def draining(self) -> bool:
        """Whether the server is on its way out."""
        return self._draining

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._server_exit.seen:
            if self._stopped.wait(_CHECK_PERIOD_S):
                return
        self._draining = True
        if not self._stopped.wait(self._drain_timeout_s):
            self._abort_all()
