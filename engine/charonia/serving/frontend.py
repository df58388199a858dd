"""A frontend's thread: it joins the engine, starts it where need be, and tells requests what becomes of them."""

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.errors import CharoniaError, EngineDeadError, RequestCancelledError
from charonia.request import EngineRequest, TokenDelta
from charonia.serving import wire
from charonia.serving.engine_home import EngineHome
from charonia.serving.engine_link import EngineLink, EngineLostError
from charonia.serving.live_embedding import LiveEmbedding
from charonia.serving.live_request import LiveRequest
from charonia.serving.mailbox import Mailbox
from charonia.serving.metrics import TokenMeter
from charonia.serving.processes import is_alive
from charonia.serving.request import OutputSink

logger = logging.getLogger("charonia.frontend")

RESTART_BACKOFF_S = 0.5


@dataclass(eq=False, slots=True)
class RequestHandle:
    """A submitted request, for `AsyncEngine.abort`."""

    live: LiveRequest | LiveEmbedding
    sink: OutputSink
    engine_requests: list[EngineRequest] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Abort:
    handle: RequestHandle


@dataclass(frozen=True, slots=True)
class _Flush:
    """The engine has not taken all that was sent; the thread sees to the rest."""


@dataclass(frozen=True, slots=True)
class _Shutdown:
    drain_timeout_s: float


class Frontend:
    """The connection to one engine after the other, and the live requests.

    Whoever submits sends to the engine itself; one thread receives, turns token ids into text, calls the sinks and
    aborts. When the engine dies every live request ends with `EngineDeadError`, and a new engine is started, a bounded
    number of times.
    """

    def __init__(
        self, config: EngineConfig, home: EngineHome, member: str, owner_pid: int, meter: TokenMeter
    ) -> None:
        self._config = config
        self._home = home
        self._member = member
        self._owner_pid = owner_pid
        self.meter = meter
        self.stats = EngineStats()
        """The engine's latest."""
        self._commands: Mailbox[_Abort | _Flush | _Shutdown] = Mailbox()
        self._gate = threading.Lock()
        """Held to submit and to change the link, so that what ends all requests misses none."""
        self._link: EngineLink | None = None
        """Where requests are sent; None while none are taken."""
        self._live: dict[int, RequestHandle] = {}
        """Added to under the gate, while there is a link; all else is the thread's."""
        self._why_not_ready = "the engine is starting"
        self._closing = False
        self._first_ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="charonia-frontend", daemon=True)

    # ---- for callers, on any thread ----

    def start(self, timeout_s: float) -> None:
        """Returns once the engine is ready. Raises `TimeoutError`, or why it cannot be."""
        self._thread.start()
        self._first_ready.result(timeout_s)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._link is not None and not self._closing

    def check_ready(self) -> None:
        """Raise `EngineDeadError` unless requests are taken."""
        if self._closing:
            raise EngineDeadError("the model is shutting down")
        if self._link is None:
            raise EngineDeadError(f"the model is not ready: {self._why_not_ready}")

    def submit(self, handle: RequestHandle) -> None:
        """Send a request to the engine. Raises `EngineDeadError`; its sink is then not called."""
        with self._gate:
            self.check_ready()
            link = self._link
            assert link is not None
            first_id = handle.live.first_id = link.take_ids(len(handle.engine_requests))
            requests = [
                msgspec.structs.replace(request, request_id=first_id + request.request_id)
                for request in handle.engine_requests
            ]
            handle.engine_requests = []
            # Before it is sent: its first tokens may be back before `send` returns.
            for request_id in handle.live.engine_ids:
                self._live[request_id] = handle
            if not link.send(wire.Submit(requests)):
                self._commands.put(_Flush())

    def abort(self, handle: RequestHandle) -> None:
        """End a request; its sink gets `RequestCancelledError`, unless it has ended already."""
        self._commands.put(_Abort(handle))

    def shutdown(self, drain_timeout_s: float) -> None:
        """See `AsyncEngine.shutdown`."""
        self._closing = True
        self._commands.put(_Shutdown(drain_timeout_s))
        if self._thread.is_alive():
            self._thread.join()

    # ---- the thread ----

    def _run(self) -> None:
        """Serve one engine after the other, until told to stop or too many have died."""
        died = 0
        while True:
            link = None
            try:
                link = EngineLink.open(
                    self._home, self._config, self._member, self._owner_pid, self._closing_now
                )
                self._set_link(link)
                self._serve(link)
                return
            except EngineLostError as error:
                self._why_not_ready = str(error)
                self._lose_engine(error)
            except CharoniaError as error:
                self._why_not_ready = str(error)
                if not self._first_ready.done():
                    self._first_ready.set_exception(error)
                else:
                    logger.error("the engine could not be restarted: %s", error)
                self._lose_engine(error)
                return
            except Exception as error:
                # Whatever went wrong here, no request may be left waiting.
                logger.exception("the frontend failed")
                self._why_not_ready = f"the frontend failed: {type(error).__name__}"
                if not self._first_ready.done():
                    self._first_ready.set_exception(error)
                self._lose_engine(EngineDeadError(self._why_not_ready))
                return
            finally:
                self._set_link(None)
                if link is not None:
                    link.close()
            died += 1
            if not is_alive(self._owner_pid):
                self._give_up("the process that owns the engine has died")
                return
            if self._closing or self._home.restarts_left() <= 0:
                self._give_up(f"the engine died too often; the last time: {self._why_not_ready}")
                self._home.give_up(self._why_not_ready)
                return
            logger.error("the engine was lost (%s); starting another", self._why_not_ready)
            time.sleep(min(8.0, RESTART_BACKOFF_S * 2 ** (died - 1)))

    def _closing_now(self) -> bool:
        return self._closing

    def _set_link(self, link: EngineLink | None) -> None:
        with self._gate:
            self._link = link
        if link is not None and not self._first_ready.done():
            self._first_ready.set_result(None)

    def _give_up(self, reason: str) -> None:
        self._why_not_ready = reason
        logger.error("%s", reason)
        if not self._first_ready.done():
            self._first_ready.set_exception(EngineDeadError(reason))

    def _lose_engine(self, error: CharoniaError) -> None:
        """End every live request; none is taken from here on."""
        self._set_link(None)
        self.meter.forget_sequences()
        handles = {id(handle): handle for handle in self._live.values()}
        self._live.clear()
        for command in self._commands.take():
            if isinstance(command, _Shutdown):
                self._closing = True
        for handle in handles.values():
            try:
                handle.sink.on_error(EngineDeadError(f"the engine was lost: {error}"))
            except Exception:
                # One sink at fault must not leave the other requests waiting.
                logger.exception("a request could not be told that the engine was lost")

    def _serve(self, link: EngineLink) -> None:
        """Shuttle messages until shutdown. Raises `EngineLostError`."""
        deadline: float | None = None
        while True:
            timeout = 1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            frames = link.wait(self._commands.fileno(), timeout)
            for frame in frames:
                if frame.stats is not None:
                    self.stats = frame.stats
                if frame.deltas:
                    self.meter.note_step(frame.deltas, time.monotonic())
                    self._dispatch(link, frame.deltas)
            for command in self._commands.take():
                if isinstance(command, _Abort):
                    self._cancel(link, command.handle)
                elif isinstance(command, _Shutdown):
                    deadline = time.monotonic() + command.drain_timeout_s
            if deadline is not None and (not self._live or time.monotonic() >= deadline):
                self._lose_engine(EngineDeadError("the model is shutting down"))
                link.leave()
                return

    def _cancel(self, link: EngineLink, handle: RequestHandle) -> None:
        ids = [request_id for request_id in handle.live.engine_ids if self._live.get(request_id) is handle]
        if ids:
            self._forget(handle)
            link.send(wire.Abort(ids))
            handle.sink.on_error(RequestCancelledError("the request was cancelled"))

    def _dispatch(self, link: EngineLink, deltas: list[TokenDelta]) -> None:
        """Feed a step's deltas to their requests, then show what each of them has to show."""
        touched: dict[int, RequestHandle] = {}
        for delta in deltas:
            handle = self._live.get(delta.request_id)
            if handle is not None:
                handle.live.push(delta)
                touched[id(handle)] = handle
        aborts: list[int] = []
        for handle in touched.values():
            live = handle.live
            aborts.extend(live.take_aborts())
            if live.finished:
                self._forget(handle)
            output = live.take()
            if live.error is not None:
                handle.sink.on_error(live.error)
            elif output is not None:
                handle.sink.on_output(output)
        if aborts:
            link.send(wire.Abort(aborts))

    def _forget(self, handle: RequestHandle) -> None:
        for request_id in handle.live.engine_ids:
            del self._live[request_id]
