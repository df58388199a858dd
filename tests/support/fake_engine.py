"""An engine that follows a script, for tests of the Triton adapter: no model, no process, same interface.

Each word of the prompt is a token, and is generated after a delay. A prompt that begins with `@{...}` carries a script:

    queue_s     how long the request stays queued before its first step      prefill_s   how long its prefill takes
    delay_s     between tokens                     tokens    how many tokens instead of the prompt's words
    error       an error code, raised by `submit`, or after `error_after` tokens
    crash       `submit` raises something that is no Charonia error
    quiet       tokens without text, as half characters are, before each word
    bare_end    the end comes after the last text, without text of its own

What happens to requests is appended to `events.jsonl` in the runtime folder, one object a line:
{"event", "request_id", "time" (monotonic), "state"}.
"""

import heapq
import itertools
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.errors import (
    EngineDeadError,
    ErrorCode,
    InvalidRequestError,
    RequestCancelledError,
    error_from_code,
)
from charonia.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, RequestTimings
from charonia.request import TokenDelta
from charonia.serving.metrics import TokenMeter
from charonia.serving.request import ChatInput, GenerationRequest, OutputSink


@dataclass(eq=False)
class FakeHandle:
    """A scripted request on its way."""

    request: GenerationRequest
    sink: OutputSink
    prompt: str | None
    prompt_ids: list[int]
    pieces: list[str]
    script: dict[str, Any]
    arrival: float = field(default_factory=time.monotonic)
    sent: int = 0
    state: str = "queued"
    timings: RequestTimings = field(default_factory=RequestTimings)


class FakeEngine:
    """Scripted stand-in for `AsyncEngine`; its one thread calls the sinks."""

    def __init__(self, events_path: Path | None = None) -> None:
        self.is_ready = True
        self.max_model_len = 2048
        self.meter = TokenMeter()
        self.submitted: list[GenerationRequest] = []
        self._events_path = events_path
        self._timers: list[tuple[float, int, FakeHandle]] = []
        self._order = itertools.count()
        self._started = time.monotonic()
        self._live: set[FakeHandle] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    @classmethod
    def attach(cls, config: EngineConfig, *, runtime_dir: Path, member: str, owner_pid: int) -> "FakeEngine":
        engine = cls(runtime_dir / "events.jsonl")
        engine._note("attach", member, f"{config.model} {owner_pid}")
        return engine

    def submit(self, request: GenerationRequest, sink: OutputSink) -> FakeHandle:
        self.submitted.append(request)
        prompt, ids = _render(request)
        script, text = {}, prompt or " ".join(map(str, ids))
        if text.startswith("@"):
            script, end = json.JSONDecoder().raw_decode(text[1:])
            text = text[1 + end :].strip()
        self._note("submit", request.request_id, "")
        if script.get("crash"):
            raise RuntimeError("a scripted bug with /secret/paths in it")
        if "error" in script and "error_after" not in script:
            raise error_from_code(ErrorCode(script["error"]), script.get("message", "scripted error"))
        words = [f"w{i}" for i in range(script["tokens"])] if "tokens" in script else text.split()
        pieces = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
        handle = FakeHandle(request, sink, prompt, ids, pieces[: request.params.max_tokens], script)
        with self._changed:
            if self._closing:
                raise EngineDeadError("the engine is shutting down")
            self._live.add(handle)
            self._at(script.get("queue_s", 0.0), handle)
        return handle

    def answer_utility(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if "unknown" in request:
            raise InvalidRequestError("unknown key")
        return {"asked": dict(request)}

    def abort(self, handle: FakeHandle) -> None:
        with self._changed:
            if handle not in self._live:
                return
            self._live.discard(handle)
        self._note("abort", handle.request.request_id, handle.state)
        handle.sink.on_error(RequestCancelledError("the request was cancelled"))

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                started=self._started,
                num_running=sum(handle.state != "queued" for handle in self._live),
                num_waiting=sum(handle.state == "queued" for handle in self._live),
                kv_blocks_used=7, kv_blocks_total=100, block_size=16,
                prefix_cache_queries=50, prefix_cache_hits=20, preemptions=3,
            )  # fmt: skip

    def shutdown(self, drain_timeout_s: float) -> None:
        deadline = time.monotonic() + drain_timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not self._live, max(0.0, deadline - time.monotonic()))
            self._closing = True
            rest, self._live = self._live, set()
            self._changed.notify_all()
        for handle in rest:
            handle.sink.on_error(EngineDeadError("the engine is shutting down"))
        self._thread.join()
        self._note("shutdown", "", str(len(rest)))

    def die(self) -> None:
        """The engine process is lost: every live request ends with an error."""
        self.is_ready = False
        with self._changed:
            rest, self._live = self._live, set()
        for handle in rest:
            handle.sink.on_error(EngineDeadError("the engine was lost"))

    def _at(self, delay_s: float, handle: FakeHandle) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), handle))
        self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while not self._closing:
                if not self._timers:
                    self._changed.wait()
                    continue
                wait = self._timers[0][0] - time.monotonic()
                if wait > 0:
                    self._changed.wait(wait)
                    continue
                handle = heapq.heappop(self._timers)[2]
                if handle in self._live:
                    self._step(handle)
                    self._changed.notify_all()

    def _step(self, handle: FakeHandle) -> None:
        script = handle.script
        if handle.state == "queued":
            handle.state = "prefilling"
            handle.timings.queue = time.monotonic() - handle.arrival
            self._note("scheduled", handle.request.request_id, handle.state)
            self._at(script.get("prefill_s", 0.0), handle)
            return
        handle.state = "decoding"
        if not handle.timings.first_token:
            handle.timings.first_token = time.monotonic() - handle.arrival
            self.meter.note_first_token(handle.timings, len(handle.prompt_ids))
        if handle.sent == script.get("error_after", -1):
            self._live.discard(handle)
            handle.sink.on_error(
                error_from_code(ErrorCode(script["error"]), script.get("message", "scripted error"))
            )
            return
        if script.get("quiet"):
            handle.sink.on_output(self._output(handle, "", finished=False))
        bare_end = script.get("bare_end") and handle.sent == len(handle.pieces)
        piece = "" if bare_end else handle.pieces[handle.sent]
        handle.sent += 1
        finished = handle.sent >= len(handle.pieces) + bool(script.get("bare_end"))
        if finished:
            handle.timings.total = time.monotonic() - handle.arrival
            self._live.discard(handle)
        handle.sink.on_output(self._output(handle, piece, finished=finished))
        if not finished:
            self._at(script.get("delay_s", 0.0), handle)

    def _output(self, handle: FakeHandle, piece: str, *, finished: bool) -> RequestOutput:
        params = handle.request.params
        delta = TokenDelta(
            request_id=id(handle), token_ids=[0], finish_reason=FinishReason.LENGTH if finished else None
        )
        self.meter.note_step([delta], time.monotonic())
        limit = params.max_tokens is not None and handle.sent >= params.max_tokens
        items = []
        for index in range(params.n):
            token = 100 * (index + 1) + handle.sent
            items.append(
                CompletionOutput(
                    index,
                    text=piece,
                    token_ids=[token],
                    cumulative_logprob=-0.5 * handle.sent if params.logprobs is not None else 0.0,
                    logprobs=None if params.logprobs is None else [{token: Logprob(-0.5, 1, piece)}],
                    finish_reason=(FinishReason.LENGTH if limit else FinishReason.STOP) if finished else None,
                )
            )
        return RequestOutput(
            handle.request.request_id, handle.prompt, handle.prompt_ids, items, finished,
            num_cached_tokens=2, timings=handle.timings,
        )  # fmt: skip

    def _note(self, event: str, request_id: str, state: str) -> None:
        if self._events_path is not None:
            line = {"event": event, "request_id": request_id, "time": time.monotonic(), "state": state}
            with self._events_path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _render(request: GenerationRequest) -> tuple[str | None, list[int]]:
    prompt = request.prompt
    if isinstance(prompt, ChatInput):
        text = " ".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
        return text, list(range(len(text.split())))
    if isinstance(prompt, str):
        return prompt, list(range(len(prompt.split())))
    return None, list(prompt)
