"""A Triton request from `execute()` to its FINAL response."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from charonia.errors import CharoniaError
from charonia.outputs import CompletionOutput, EmbeddingRequestOutput, FinishReason, RequestOutput
from charonia.serving.request import EmbeddingRequest, GenerationRequest
from charonia.triton.embedding_outputs import EmbeddingAssembler
from charonia.triton.inputs import ParsedRequest, ResponseOptions
from charonia.triton.outputs import ResponseAssembler
from charonia.triton.pb import PbResponseSender

Output = RequestOutput | EmbeddingRequestOutput


class LiveRequest:
    """State that the threads of the adapter share about one request, and the engine's sink for its outputs.

        execute ─► intake ─► engine ──on_output──► mailbox ─► its sender thread ─► Triton
                       ▲ cancel sweep (is_cancelled)               │
                       └───────────────────────────────────────────┘ FINAL: closed

    Invariants: only its one sender thread sends, but for the first response, which the engine's thread may send as
    long as the sender has not been told of the request, and will not be before `pass_on`; `closed` turns true once,
    under `wire_lock`, when FINAL goes out; `is_cancelled()` is called under `wire_lock` and never once `closed`; after
    FINAL nothing refers to the stub's objects.
    """

    def __init__(
        self, sender: PbResponseSender, wake: Callable[["LiveRequest"], None], stream_interval: int = 1,
        wake_first: Callable[["LiveRequest"], None] | None = None,
    ) -> None:  # fmt: skip
        """wake: tells the request's sender thread that mail has come. stream_interval: see `EngineConfig`.

        wake_first: called in its place with the first output, while the sender does not know of the request.
        """
        self.request_id = ""
        """The client's own name for it."""
        self.arrival = time.monotonic()
        self.wants_error_codes = False
        """Whether error messages are to begin with their code."""
        self.wire_lock = threading.Lock()
        self.closed = False
        self.cancelled_at: float | None = None
        """When the client was first seen to be gone, on the monotonic clock."""
        self.close_scheduled = False
        """Whether a cancelled request waits to be closed; its sender thread's own note."""
        self.options = ResponseOptions()
        self.generation: GenerationRequest | EmbeddingRequest | None = None
        """What it asks for; None until it has been parsed."""
        self.assembler: ResponseAssembler | EmbeddingAssembler | None = None
        self.first_sent_at: float | None = None
        self.is_utility = False
        """Whether it needs no engine; such requests are not counted."""
        self.submitted = False
        """Whether the engine has taken the request."""
        self._sender: PbResponseSender | None = sender
        self._wake = wake
        self._wake_first: Callable[[LiveRequest], None] | None = wake_first
        """None once the sender has been told of the request."""
        self._lock = threading.Lock()
        self._outputs: list[Output] = []
        self._stream_interval = stream_interval
        self._num_waiting_tokens = stream_interval
        """Of each sequence, since the sender was last told. The first token finds it full."""
        self._error: CharoniaError | None = None
        self._awake = False
        """Whether somebody is about to look at the mail."""
        self._missed_wake = False
        """Whether there was a reason to wake the sender since the engine's thread began to send."""
        self._handle: Any = None
        self._ended = False

    @property
    def name(self) -> str:
        """The request's id for log lines."""
        return self.request_id or "without id"

    @property
    def ended(self) -> bool:
        """Whether the client has gone or the answer is complete: nothing more needs computing."""
        return self._ended

    # The engine's side.

    def on_output(self, output: Output) -> None:
        """Take a delta (see `OutputSink`)."""
        with self._lock:
            self._outputs.append(output)
            if self._awake or not self._is_due(output):
                return
            self._awake = True
            first, self._wake_first = self._wake_first, None
        wake = self._wake if first is None or output.finished else first
        wake(self)

    def _is_due(self, output: Output) -> bool:
        """Whether the sender is to be told of this output, rather than of a later one."""
        if isinstance(output, EmbeddingRequestOutput) or output.finished or self._stream_interval == 1:
            return True
        self._num_waiting_tokens += max(len(sequence.token_ids) for sequence in output.outputs)
        if self._num_waiting_tokens < self._stream_interval:
            return False
        self._num_waiting_tokens = 0
        return True

    def on_error(self, error: CharoniaError) -> None:
        """End the request with an error; of several errors the first one counts."""
        with self._lock:
            if self._error is None:
                self._error = error
        self.wake_sender()

    def wake_sender(self) -> None:
        """Have the sender thread look at the request, unless it is about to."""
        with self._lock:
            self._missed_wake = self._awake
            if self._awake:
                return
            self._awake = True
            self._wake_first = None
        self._wake(self)

    def pass_on(self) -> None:
        """The engine's thread is through with what `wake_first` gave it: from here on the request is its sender's."""
        with self._lock:
            self._awake = bool(self._outputs or self._missed_wake)
            if not self._awake:
                return
        self._wake(self)

    def start(self, parsed: ParsedRequest) -> None:
        """Get ready for outputs, before the request is submitted."""
        self.generation, self.options = parsed.generation, parsed.options
        if isinstance(parsed.generation, EmbeddingRequest):
            self.assembler = EmbeddingAssembler(parsed.options)
        else:
            self.assembler = ResponseAssembler(parsed.options, parsed.generation.params.n)

    def answer_utility(self, answer: Mapping[str, Any]) -> None:
        """Answer with a JSON object: the request was one that needs no engine."""
        self.assembler = ResponseAssembler(self.options, 1)
        text = msgspec.json.encode(answer).decode()
        output = CompletionOutput(0, text, finish_reason=FinishReason.STOP)
        self.on_output(RequestOutput(self.request_id, None, [], [output], finished=True))

    def attach(self, handle: Any) -> bool:
        """Remember the engine's handle. False when the request has ended meanwhile: the caller must abort it."""
        with self._lock:
            self._handle = handle
            self.submitted = True
            return not self._ended

    def end(self) -> Any:
        """Mark that no more is wanted of the engine. Returns the handle to abort, None if there is none (yet)."""
        with self._lock:
            self._ended = True
            handle, self._handle = self._handle, None
            return handle

    # The sender thread's side.

    def take_outputs(self) -> list[Output]:
        """All that have come, for the engine's thread; the sender will not look before `pass_on`."""
        with self._lock:
            outputs, self._outputs = self._outputs, []
            return outputs

    def take_mail(self) -> tuple[list[Output], CharoniaError | None]:
        """Everything that has come since the last call; a lagging sender finds several deltas here and merges them."""
        with self._lock:
            outputs, self._outputs = self._outputs, []
            self._awake = False
            return outputs, self._error

    def error_text(self, error: CharoniaError) -> str:
        """The message of an error as the client wants it."""
        return f"[{error.code}] {error}" if self.wants_error_codes else str(error)

    def send(self, response: object) -> None:
        """Send one response that is not the last. Raises what the stub raises."""
        assert self._sender is not None
        self._sender.send(response)

    def close(self, response: object | None, final_flag: int, *, unless_cancelled: bool) -> bool:
        """Send the last response (or the flag alone), then let go of the stub's objects.

        With `unless_cancelled`, a client that turns out to be gone keeps the request open: `cancelled_at` is set and
        False is returned. Raises what the stub raises, the request being closed all the same.
        """
        with self.wire_lock:
            if self.closed:
                return True
            assert self._sender is not None
            if unless_cancelled and self.cancelled_at is None and self._sender.is_cancelled():
                self.cancelled_at = time.monotonic()
                return False
            sender, self._sender = self._sender, None
            self.closed = True
            try:
                if response is None:
                    sender.send(flags=final_flag)
                else:
                    sender.send(response, flags=final_flag)
            finally:
                with self._lock:
                    self._outputs = []
        return True

    # The sweeper's side.

    def poll_cancelled(self) -> bool:
        """Whether the client has gone since the last call; never waits for a request that is being closed."""
        if not self.wire_lock.acquire(blocking=False):
            return False
        try:
            if self.closed or self.cancelled_at is not None or self._sender is None:
                return False
            if not self._sender.is_cancelled():
                return False
            self.cancelled_at = time.monotonic()
            return True
        finally:
            self.wire_lock.release()
