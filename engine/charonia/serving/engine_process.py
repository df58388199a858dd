"""The engine process: the step loop, fed and read over a socket. `python -m charonia.serving.engine_process DIR`."""

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from charonia.config import EngineConfig
from charonia.core.engine_core import EngineCore
from charonia.errors import CharoniaError, ErrorCode
from charonia.model_config import ModelConfig
from charonia.outputs import FinishReason
from charonia.request import TokenDelta
from charonia.serving import wire
from charonia.serving.channel import Channel, Listener
from charonia.serving.engine_builder import build_engine
from charonia.serving.engine_home import EngineDir, EngineHome, EngineStatus
from charonia.serving.processes import die_with_parent, open_pidfd, parent_of, wait_for_exit
from charonia.serving.watchdog import Watchdog

logger = logging.getLogger("charonia.engine")

BuildEngine = Callable[[EngineConfig, ModelConfig], tuple[EngineCore, str]]

STATS_INTERVAL_S = 0.25
IDLE_POLL_MS = 1000
FIRST_MEMBER_TIMEOUT_S = 60.0
MAX_UNREAD_BYTES = 256 << 20
"""What a frontend may leave unread before it is taken for dead."""


@dataclass(eq=False, slots=True)
class _Client:
    """A connection. index, pidfd: of the frontend behind it, once it has said who it is."""

    channel: Channel
    index: int | None = None
    pidfd: int | None = None
    request_ids: set[int] = field(default_factory=set)


class EngineServer:
    """Owns the engine and its socket. One thread: poll, step, send.

    Ends when its last frontend leaves or dies. A frontend's death ends its requests.
    """

    def __init__(self, core: EngineCore, directory: EngineDir, watchdog: Watchdog, owner_pid: int) -> None:
        self._core = core
        self._owner_pid = owner_pid
        self._home = EngineHome(directory.path.parent)
        self._directory = directory
        self._watchdog = watchdog
        self._clients: dict[int, _Client] = {}
        """The frontends, by their index."""
        self._by_fd: dict[int, _Client] = {}
        """All connections by their channels' descriptors, and frontends by their pidfds."""
        self._next_client = 1
        self._stopping = False
        self._last_stats = 0.0
        self._listener = Listener(directory.socket_path)
        self._poller = select.poll()
        self._poller.register(self._listener, select.POLLIN)
        self._started = time.monotonic()

    def stop(self) -> None:
        """End the loop after the step at hand."""
        self._stopping = True

    def run(self) -> None:
        """Serve until the last frontend has gone."""
        while not self._stopping:
            self._receive(0 if self._core.has_work else IDLE_POLL_MS)
            if self._core.has_work:
                with self._watchdog.step():
                    deltas = self._core.step()
                self._send_deltas(deltas)
            self._send_stats()
            self._end_when_alone()
        self._core.shutdown()
        self._listener.close()
        for client in set(self._by_fd.values()):
            client.channel.close()

    # ---- receiving ----

    def _receive(self, timeout_ms: int) -> None:
        for fd, events in self._poller.poll(timeout_ms):
            client = self._by_fd.get(fd)
            if fd == self._listener.fileno():
                for channel in self._listener.accept():
                    self._by_fd[channel.fileno()] = _Client(channel)
                    self._poller.register(channel, select.POLLIN)
            elif client is None:
                continue  # dropped since the poll
            elif fd == client.pidfd:
                if not wait_for_exit(fd, 0):
                    continue  # another process's by now
                logger.warning("frontend %s died; its %d requests end", client.index, len(client.request_ids))
                self._drop(client)
            else:
                self._serve(client, events)

    def _serve(self, client: _Client, events: int) -> None:
        if events & select.POLLOUT:
            client.channel.flush()
            if not client.channel.num_unsent:
                self._poller.modify(client.channel, select.POLLIN)
        if not events & ~select.POLLOUT:
            return
        for data in client.channel.receive():
            try:
                message = wire.decode_to_engine(data)
            except (msgspec.DecodeError, CharoniaError) as error:
                logger.warning("dropped a message that is none of ours: %s", error)
                continue
            self._handle(client, message)
        if client.channel.closed:
            self._drop(client)

    def _handle(self, client: _Client, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Hello):
            self._welcome(client, message.pid)
        elif client.index is None:
            return
        elif isinstance(message, wire.Submit):
            self._submit(client, message)
        elif isinstance(message, wire.Abort):
            for request_id in message.request_ids:
                self._core.abort(request_id)
        else:
            self._drop(client)

    def _welcome(self, client: _Client, pid: int) -> None:
        pidfd = open_pidfd(pid) if client.index is None else None
        if pidfd is None:
            return
        self._poller.register(pidfd, select.POLLIN)
        if parent_of(pid) == self._owner_pid:
            self._watchdog.add_dependent(pidfd)
        client.index, client.pidfd = self._next_client, pidfd
        self._next_client += 1
        self._clients[client.index] = self._by_fd[pidfd] = client
        self._send(client, wire.Welcome(client.index))

    def _submit(self, client: _Client, message: wire.Submit) -> None:
        refused: list[TokenDelta] = []
        for request in message.requests:
            try:
                self._core.add(request)
            except CharoniaError as error:
                refused.append(
                    TokenDelta(
                        request_id=request.request_id,
                        finish_reason=FinishReason.ERROR,
                        error=str(error),
                        error_code=error.code.value,
                    )
                )
            else:
                client.request_ids.add(request.request_id)
        if refused:
            self._send(client, wire.OutputFrame(refused))

    def _drop(self, client: _Client) -> None:
        """Hang up, and end the frontend's requests; without effect the second time."""
        if self._by_fd.pop(client.channel.fileno(), None) is not client:
            return
        self._poller.unregister(client.channel)
        client.channel.close()
        if client.index is None or client.pidfd is None:
            return
        del self._clients[client.index], self._by_fd[client.pidfd]
        for request_id in client.request_ids:
            self._core.abort(request_id, "the frontend is gone", ErrorCode.UNAVAILABLE)
        self._poller.unregister(client.pidfd)
        self._watchdog.remove_dependent(client.pidfd)
        os.close(client.pidfd)
        # What it has sent besides is nobody's.
        client.index = client.pidfd = None

    # ---- sending ----

    def _send_deltas(self, deltas: list[TokenDelta]) -> None:
        frames: dict[int, list[TokenDelta]] = {}
        for delta in deltas:
            index = delta.request_id >> wire.CLIENT_SHIFT
            client = self._clients.get(index)
            if client is None:
                continue
            if delta.finish_reason is not None:
                client.request_ids.discard(delta.request_id)
            frames.setdefault(index, []).append(delta)
        for index, items in frames.items():
            self._send(self._clients[index], wire.OutputFrame(items))

    def _send_stats(self) -> None:
        now = time.monotonic()
        if now - self._last_stats >= STATS_INTERVAL_S:
            self._last_stats = now
            stats = self._core.stats()
            self._watchdog.note_requests(stats.num_running + stats.num_waiting)
            for client in list(self._clients.values()):
                self._send(client, wire.OutputFrame([], stats))

    def _send(self, client: _Client, message: wire.ToFrontend) -> None:
        if client.channel.send(wire.encode(message)):
            return
        if client.channel.num_unsent > MAX_UNREAD_BYTES:
            logger.warning("frontend %s does not read; its requests end", client.index)
            self._drop(client)
        else:
            self._poller.modify(client.channel, select.POLLIN | select.POLLOUT)

    # ---- the end ----

    def _end_when_alone(self) -> None:
        if self._clients or (
            time.monotonic() - self._started < FIRST_MEMBER_TIMEOUT_S and self._next_client == 1
        ):
            return
        # Under the lock, so that no frontend joins an engine that has decided to go.
        with self._home.locked():
            if not self._directory.living_members():
                self._watchdog.set_state("draining")
                self._stopping = True


def main(argv: list[str] | None = None, build: BuildEngine = build_engine) -> int:
    """Load the model, serve, and report failure in the status file.

    build: makes the engine and a line for the log; benchmarks have engines without a model.
    """
    parser = argparse.ArgumentParser(description="Charonia engine process; started by its frontends.")
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--owner-pid", type=int, required=True, help="the engine does not outlive this process"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if os.getppid() == args.owner_pid:
        die_with_parent(args.owner_pid)
    directory = EngineDir(args.directory)
    config = directory.read_config()
    previous = directory.read_status()
    status = EngineStatus(
        pid=os.getpid(),
        state="starting",
        generation=directory.generation,
        beat=0.0,
        restarts=previous.restarts if previous else 0,
    )
    watchdog = Watchdog(directory, status, owner_pid=args.owner_pid, step_timeout_s=config.step_timeout_s)
    watchdog.start()
    try:
        core, summary = build(config, ModelConfig.from_dir(config.model))
        server = EngineServer(core, directory, watchdog, args.owner_pid)
    except Exception as error:
        if not isinstance(error, CharoniaError):
            logger.exception("the engine could not start")
        code = error.code if isinstance(error, CharoniaError) else ErrorCode.INTERNAL
        watchdog.fail(str(error) or type(error).__name__, code)
        return 1
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: server.stop())
    # What is alive now lives for ever: keep the collector from walking it again.
    gc.collect()
    gc.freeze()
    watchdog.set_state("ready")
    logger.info("ready: %s", summary)
    server.run()
    watchdog.stop()
    with contextlib.suppress(FileNotFoundError):
        (directory.path / "engine.sock").unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
