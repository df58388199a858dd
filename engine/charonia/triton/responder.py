"""The threads that send responses: never `execute()`'s, and the engine's only where nobody else can be waiting."""

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from charonia.errors import CharoniaError, ErrorCode, RequestCancelledError
from charonia.triton.live_request import LiveRequest, Output
from charonia.triton.pb import PbResponseSender, TritonUtils

_CANCELLED = "the request was cancelled"


class Responder:
    """A few sender threads; each live request belongs to one of them for life.

    A send blocks for 70 to 190 microseconds, so a sender may lag behind the engine. Deltas that gather meanwhile leave
    as one response: clients get a response per token until a sender is saturated, and never a backlog.

    The first response of a request that is alone leaves on the engine's thread: to wake another takes as long as half
    of a send, and there is nobody whom the send could hold up. (It waits for the server, not for the client.)

    cancel_final_delay_s: how long after a cancellation its FINAL goes out. Servers of release 24.10 crash now and then
    when it follows at once. The stub cannot learn the server's version, so the delay always holds; nobody waits for it.
    on_closed: called on a sender thread once a request has been closed, with the error that closed it, if any.
    abort: ends the request in the engine. stream_interval: see `EngineConfig`. num_live: requests that are live.
    """

    def __init__(
        self,
        utils: TritonUtils,
        *,
        num_senders: int,
        cancel_final_delay_s: float,
        on_closed: Callable[[LiveRequest, CharoniaError | None], None],
        abort: Callable[[Any], None],
        stream_interval: int = 1,
        num_live: Callable[[], int] | None = None,
    ) -> None:
        self._num_live = num_live
        self._stream_interval = stream_interval
        self._senders = [
            _Sender(f"charonia-sender-{i}", utils, cancel_final_delay_s, on_closed, abort)
            for i in range(num_senders)
        ]
        self._next_sender = itertools.cycle(self._senders)

    def admit(self, sender: PbResponseSender) -> LiveRequest:
        """Make a request live and give it to a sender thread."""
        thread = next(self._next_sender)
        return LiveRequest(sender, thread.wake, self._stream_interval, partial(self._wake_first, thread))

    def _wake_first(self, thread: "_Sender", request: LiveRequest) -> None:
        """On the engine's thread: the first output of a request has come."""
        if self._num_live is not None and self._num_live() == 1 and request.options.stream:
            thread.send_first(request)
        else:
            thread.wake(request)

    def stop(self) -> None:
        """End the threads once all that was handed to them before is out."""
        for sender in self._senders:
            sender.stop()


class _Sender:
    """One sender thread and its requests."""

    def __init__(
        self,
        name: str,
        utils: TritonUtils,
        cancel_final_delay_s: float,
        on_closed: Callable[[LiveRequest, CharoniaError | None], None],
        abort: Callable[[Any], None],
    ) -> None:
        self._utils = utils
        self._cancel_final_delay_s = cancel_final_delay_s
        self._on_closed = on_closed
        self._abort = abort
        self._inbox: queue.SimpleQueue[LiveRequest | None] = queue.SimpleQueue()
        self._due: list[tuple[float, int, LiveRequest]] = []
        """Heap of cancelled requests by the time at which each is to be closed."""
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self, request: LiveRequest) -> None:
        """The request has mail."""
        self._inbox.put(request)

    def send_first(self, request: LiveRequest) -> None:
        """Send what has come of a request that the thread has not been told of."""
        outputs = request.take_outputs()
        self._guarded(request, lambda request: self._send_outputs(request, outputs))
        request.pass_on()

    def stop(self) -> None:
        """End the thread once its inbox is empty and every cancelled request is closed."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        stopping = False
        while not (stopping and not self._due):
            request = None
            try:
                request = self._inbox.get(timeout=self._until_due())
                stopping = stopping or request is None
            except queue.Empty:
                pass
            if request is not None and not request.closed:
                self._guarded(request, self._serve)
            while self._due and self._due[0][0] <= time.monotonic():
                late = heapq.heappop(self._due)[2]
                self._guarded(late, self._close_cancelled)

    def _until_due(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _guarded(self, request: LiveRequest, action: Callable[[LiveRequest], None]) -> None:
        """No request may end its sender thread, whatever its client or the server does."""
        try:
            action(request)
        except Exception as error:
            self._utils.log_error(f"request {request.name}: cannot send a response: {error!r}")
            try:
                self._give_up(request)
            except Exception as again:
                self._utils.log_error(f"request {request.name}: cannot be given up: {again!r}")

    def _serve(self, request: LiveRequest) -> None:
        """Send what there is to send of one request."""
        outputs, error = request.take_mail()
        if request.cancelled_at is not None:
            self._postpone(request)
        elif error is not None:
            response = self._utils.error_response(error.code, request.error_text(error))
            self._close(request, response, error)
        elif outputs:
            self._send_outputs(request, outputs)

    def _send_outputs(self, request: LiveRequest, outputs: list[Output]) -> None:
        assembler = request.assembler
        assert assembler is not None
        for output in outputs:
            assembler.add(output)
        if assembler.finished:
            if request.first_sent_at is None:
                request.first_sent_at = time.monotonic()
            self._close(request, self._utils.response(assembler.take()), None)
        elif request.options.stream and assembler.has_content:
            request.send(self._utils.response(assembler.take()))
            if request.first_sent_at is None:
                request.first_sent_at = time.monotonic()

    def _close(self, request: LiveRequest, response: object, error: CharoniaError | None) -> None:
        if request.close(response, self._utils.final_flag, unless_cancelled=self._cancel_final_delay_s > 0):
            self._closed(request, error)
        else:
            self._postpone(request)

    def _postpone(self, request: LiveRequest) -> None:
        """Close a cancelled request, in due time."""
        if request.close_scheduled:
            return
        request.close_scheduled = True
        handle = request.end()
        if handle is not None:
            self._abort(handle)
        assert request.cancelled_at is not None
        due = request.cancelled_at + self._cancel_final_delay_s
        heapq.heappush(self._due, (due, next(self._order), request))

    def _close_cancelled(self, request: LiveRequest) -> None:
        response = self._utils.error_response(ErrorCode.CANCELLED, _CANCELLED)
        request.close(response, self._utils.final_flag, unless_cancelled=False)
        self._closed(request, RequestCancelledError(_CANCELLED))

    def _give_up(self, request: LiveRequest) -> None:
        """A send has failed: free whatever the server and the engine still hold of the request."""
        if not request.closed:
            try:
                request.close(None, self._utils.final_flag, unless_cancelled=False)
            except Exception as error:
                self._utils.log_warning(f"request {request.name}: cannot be closed: {error!r}")
        self._closed(request, CharoniaError("the response could not be sent"))

    def _closed(self, request: LiveRequest, error: CharoniaError | None) -> None:
        handle = request.end()
        if handle is not None and error is not None:
            self._abort(handle)
        self._on_closed(request, error)
