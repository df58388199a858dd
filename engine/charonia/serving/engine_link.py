"""A frontend's connection to one engine process."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from charonia.config import EngineConfig
from charonia.errors import EngineDeadError, ErrorCode, ModelLoadError, error_from_code
from charonia.serving import wire
from charonia.serving.channel import Channel
from charonia.serving.engine_home import EngineDir, EngineHome
from charonia.serving.processes import open_pidfd, wait_for_exit

POLL_S = 0.02
EXIT_TIMEOUT_S = 15.0
HANG_UP_EXIT_S = 1.0
"""How long an engine that has hung up is given to end."""
PULSE_CHECK_S = 1.0
MAX_MISSED_BEATS = 15
"""Checks of the engine's status in a row that may find no new beat. An engine that is past them hangs: its watchdog
beats once a second whatever the steps do. Checks are counted, not time: a machine that was suspended harms nobody."""


class EngineLostError(EngineDeadError):
    """The engine process has ended, or does not answer."""


class EngineLink:
    """Channel and pidfd of one engine. `open` connects; every wait notices the engine's death.

    Used by one thread, but for `send` and `take_ids`, which its user may have others call, one at a time.
    """

    def __init__(self, home: EngineHome, directory: EngineDir, member: str, pid: int, pidfd: int) -> None:
        self._home = home
        self._directory = directory
        self._member = member
        self._pid = pid
        self._pidfd = pidfd
        self._left = False
        self._client_index = 0
        self._next_id = 0
        self._beat = 0.0
        self._missed_beats = 0
        self._next_check = 0.0
        self._channel: Channel | None = None
        self._poller = select.poll()
        self._poller.register(pidfd, select.POLLIN)
        self._polled: dict[int, int] = {}
        """Events that are waited for, by descriptor, besides the engine's end."""

    @classmethod
    def open(
        cls,
        home: EngineHome,
        config: EngineConfig,
        member: str,
        owner_pid: int,
        cancelled: Callable[[], bool],
    ) -> "EngineLink":
        """Join or start the engine and wait until it is ready.

        Raises the engine's own error if it failed to start, `EngineLostError` if it died, or `EngineDeadError` when
        `cancelled()` turned true meanwhile.
        """
        directory = home.join(config, member, owner_pid)
        status = directory.read_status()
        assert status is not None, "an engine has a status from its first moment"
        pidfd = open_pidfd(status.pid)
        if pidfd is None:
            raise EngineLostError("the engine process ended while starting")
        link = cls(home, directory, member, status.pid, pidfd)
        try:
            link._wait_ready(cancelled)
        except BaseException:
            link.close()
            raise
        return link

    def _wait_ready(self, cancelled: Callable[[], bool]) -> None:
        while True:
            ended = wait_for_exit(self._pidfd, POLL_S)
            status = self._directory.read_status()
            if status is not None and status.state == "ready" and not ended:
                break
            if status is not None and status.state == "failed":
                code = ErrorCode(status.error_code or ErrorCode.INTERNAL)
                message = status.error or "the engine could not start"
                raise (
                    ModelLoadError(message)
                    if code is ErrorCode.INVALID_ARG
                    else error_from_code(code, message)
                )
            if ended:
                raise EngineLostError("the engine process ended while starting; its log says why")
            if cancelled():
                raise EngineDeadError("shut down while the engine was starting")
        self._connect()
        self.send(wire.Hello(os.getpid()))
        while not self._client_index:
            self.wait(None, 1.0)

    def wait(self, wake_fd: int | None, timeout_s: float) -> list[wire.OutputFrame]:
        """Frames that have arrived; waits until there are some, `wake_fd` is readable, or time is up.

        Raises `EngineLostError`, but only after every frame that the engine has sent was returned. An engine that
        shows no sign of life for about 15 seconds is killed.
        """
        channel = self._channel
        assert channel is not None, "only a link that is open is waited for"
        self._poll_for(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.num_unsent else 0))
        if wake_fd is not None:
            self._poll_for(wake_fd, select.POLLIN)
        events = dict(self._poller.poll(timeout_s * 1000))
        ready = events.get(channel.fileno(), 0)
        if ready & select.POLLOUT:
            channel.flush()
        frames = self._receive(channel) if ready & ~select.POLLOUT else []
        if not frames:
            if self._pidfd in events:
                raise EngineLostError(f"the engine process (pid {self._pid}) ended unexpectedly")
            if channel.closed:
                self._fail_closed()
            self._check_pulse()
        return frames

    def _poll_for(self, fd: int, events: int) -> None:
        if self._polled.get(fd) != events:
            self._polled[fd] = events
            self._poller.register(fd, events)

    def _receive(self, channel: Channel) -> list[wire.OutputFrame]:
        frames = []
        for data in channel.receive():
            message = wire.decode_to_frontend(data)
            if isinstance(message, wire.Welcome):
                self._client_index = message.client_index
            else:
                frames.append(message)
        return frames

    def _fail_closed(self) -> None:
        """The engine has hung up: it ends, or it has given this frontend up."""
        if wait_for_exit(self._pidfd, HANG_UP_EXIT_S):
            raise EngineLostError(f"the engine process (pid {self._pid}) ended unexpectedly")
        raise EngineLostError(f"the engine process (pid {self._pid}) closed the connection")

    def _connect(self) -> None:
        try:
            self._channel = Channel.connect(self._directory.socket_path)
        except OSError as error:
            raise EngineLostError(f"the engine does not take connections: {error}") from None

    def _check_pulse(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + PULSE_CHECK_S
        status = self._directory.read_status()
        beat = status.beat if status is not None else self._beat
        self._missed_beats = self._missed_beats + 1 if beat == self._beat else 0
        self._beat = beat
        if self._missed_beats >= MAX_MISSED_BEATS:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            wait_for_exit(self._pidfd, EXIT_TIMEOUT_S)
            raise EngineLostError(f"the engine process (pid {self._pid}) hung and was killed")

    def send(self, message: wire.ToEngine) -> bool:
        """Send a message, never blocking; False if `wait` is to be called again for all of it to leave."""
        assert self._channel is not None, "only a link that is open is sent to"
        return self._channel.send(wire.encode(message))

    def take_ids(self, count: int) -> int:
        """The first of `count` consecutive request ids that no other request of the engine has."""
        first, self._next_id = self._next_id, self._next_id + count
        return self._client_index << wire.CLIENT_SHIFT | first

    def leave(self) -> None:
        """Say goodbye; if this was the last frontend, wait until the engine is gone, and kill it if it stays."""
        self._left = True
        last = self._home.leave(self._directory, self._member)
        self.send(wire.Bye())
        if not last:
            return
        if not wait_for_exit(self._pidfd, EXIT_TIMEOUT_S):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            wait_for_exit(self._pidfd, EXIT_TIMEOUT_S)
        self._home.discard(self._directory)

    def close(self) -> None:
        """Release the socket; the frontend is no longer a member, and the engine ends if it was the last."""
        if not self._left and not wait_for_exit(self._pidfd, 0):
            self._home.leave(self._directory, self._member, end_pid=self._pid)
        if self._channel is not None:
            self._channel.close()
        os.close(self._pidfd)
