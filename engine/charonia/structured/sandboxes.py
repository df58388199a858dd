"""Several sandboxes: a grammar that takes its time, or its sandbox's life, holds up no other."""

import threading

from charonia.structured.sandbox import Sandbox, Setup


class Sandboxes:
    """As many as there are threads that try grammars out; one is started only while no started one is idle."""

    def __init__(self, python: str, setup: Setup, count: int) -> None:
        self._all = tuple(Sandbox(python, setup) for _ in range(count))
        self._idle = list(self._all)
        self._lock = threading.Lock()

    def try_out(self, params: bytes) -> str:
        """As `Sandbox.try_out`, from at most `count` threads at once."""
        with self._lock:
            assert self._idle, "there is one for each thread"
            sandbox = max(self._idle, key=lambda idle: idle.is_started)
            self._idle.remove(sandbox)
        try:
            return sandbox.try_out(params)
        finally:
            with self._lock:
                self._idle.append(sandbox)

    def kill(self) -> None:
        """End all processes for good, from any thread: whoever waits for them waits no longer."""
        for sandbox in self._all:
            sandbox.kill()

    def close(self) -> None:
        """End what processes there are; no thread tries anything out any more."""
        for sandbox in self._all:
            sandbox.close()
