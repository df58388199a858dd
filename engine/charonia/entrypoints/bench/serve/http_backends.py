"""Triton's generate_stream and the OpenAI API: one request a connection at a time."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec

from charonia.entrypoints.bench.serve.http1 import Http1Connection
from charonia.entrypoints.bench.serve.records import RequestRecord
from charonia.entrypoints.bench.serve.target import BenchError, Target, sampling_of
from charonia.entrypoints.bench.serve.workload import BenchRequest


class Answer(ABC):
    """An `EventSink` that fills a record."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self._error: str | None = None

    @abstractmethod
    def read(self, data: bytes, now_ns: int) -> str | None:
        """Note what an event says; returns an error that it reports. Raises msgspec.DecodeError."""

    def on_event(self, data: bytes, now_ns: int) -> None:
        """See `EventSink`."""
        try:
            error = self.read(data, now_ns)
        except msgspec.DecodeError as problem:
            error = f"an event cannot be read: {problem}"
        self._error = self._error or error

    def on_end(self, now_ns: int, error: str | None) -> None:
        """See `EventSink`."""
        self.record.end(now_ns, self._error or error)


class Http1Backend:
    """Implements `Backend`. There are as many connections as there are requests at once; they are kept open."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._path, self._answer = _DIALECTS[target.backend]
        self._open: set[Http1Connection] = set()
        self._idle: list[Http1Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        path = target.path + self._path.format(model=target.model)
        lines = [f"POST {path} HTTP/1.1", f"Host: {target.authority}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in target.headers]
        self._head = "\r\n".join(lines).encode()

    def encode(self, request: BenchRequest, request_id: str) -> bytes:
        """See `Backend`."""
        make = _triton_body if self._target.backend == "triton-http" else _openai_body
        body = json.dumps(make(self._target, request, request_id)).encode()
        return b"%s\r\nContent-Length: %d\r\n\r\n%s" % (self._head, len(body), body)

    async def connect(self, users: int | None) -> None:
        """See `Backend`."""
        for _ in range(users or 1):
            self._idle.append(await self._connected())

    def send(self, payload: bytes, request_id: str, record: RequestRecord) -> None:
        """See `Backend`."""
        record.sent_ns = time.monotonic_ns()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.send(payload, self._answer(record))
                return
        task = asyncio.get_running_loop().create_task(self._send_on_new(payload, record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """See `Backend`."""
        for task in self._tasks:
            task.cancel()
        for connection in self._open:
            connection.close()
        await asyncio.sleep(0)

    async def _send_on_new(self, payload: bytes, record: RequestRecord) -> None:
        try:
            connection = await self._connected()
        except OSError as error:
            record.end(time.monotonic_ns(), f"cannot connect: {error}")
        else:
            connection.send(payload, self._answer(record))

    async def _connected(self) -> Http1Connection:
        target = self._target
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Http1Connection(self._idle.append),
            target.host,
            target.port,
            ssl=target.ssl_context("http/1.1"),
        )
        self._open = {each for each in self._open if each.is_open} | {connection}
        return connection


# ---- Triton ----


class _TritonEvent(msgspec.Struct):
    num_input_tokens: int | None = None
    num_output_tokens: int | list[int] = 0
    error: Any = None


class _TritonAnswer(Answer):
    _decode = msgspec.json.Decoder(_TritonEvent).decode

    def read(self, data: bytes, now_ns: int) -> str | None:
        event = self._decode(data)
        count = event.num_output_tokens
        tokens = count if isinstance(count, int) else sum(count)
        if event.num_input_tokens is not None:
            self.record.prompt_tokens = event.num_input_tokens
        if tokens:
            self.record.respond(now_ns, tokens)
        return None if event.error is None else str(event.error)


def _triton_body(target: Target, request: BenchRequest, request_id: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": request_id,
        "stream": True,
        "exclude_input_in_output": True,
        "return_num_output_tokens": True,
        "sampling_parameters": json.dumps(sampling_of(target, request)),
    }
    if request.token_ids is None:
        body["return_num_input_tokens"] = True
    if request.token_ids is not None:
        body["input_ids"] = request.token_ids.tolist()
    elif request.messages is not None:
        body["messages"] = json.dumps(request.messages)
    else:
        body["text_input"] = request.text
    return body


# ---- OpenAI ----


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta = msgspec.field(default_factory=_Delta)

    @property
    def has_tokens(self) -> bool:
        delta = self.delta
        reasoning = delta.reasoning_content or delta.reasoning
        return bool(self.text or delta.content or reasoning or delta.tool_calls)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _OpenAiEvent(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _OpenAiAnswer(Answer):
    """A chunk is one token, unless it tells the usage so far; the usage at the end is the truth."""

    _decode = msgspec.json.Decoder(_OpenAiEvent).decode

    def read(self, data: bytes, now_ns: int) -> str | None:
        if data == b"[DONE]":
            return None
        event, record = self._decode(data), self.record
        tokens = 1
        if (usage := event.usage) is not None:
            tokens = usage.completion_tokens - (record.reported_tokens or 0)
            record.reported_tokens, record.prompt_tokens = usage.completion_tokens, usage.prompt_tokens
        if tokens > 0 and any(choice.has_tokens for choice in event.choices):
            record.respond(now_ns, tokens)
        return None if event.error is None else json.dumps(event.error)


def _openai_body(target: Target, request: BenchRequest, request_id: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    body |= sampling_of(target, request)
    if target.backend == "openai-chat":
        if request.token_ids is not None:
            raise BenchError("chat messages cannot be token ids; give prompts or messages in the dataset")
        body["messages"] = request.messages or [{"role": "user", "content": request.text}]
    elif request.messages is not None:
        raise BenchError("messages need the backend openai-chat, triton-grpc or triton-http")
    else:
        body["prompt"] = request.text if request.token_ids is None else request.token_ids.tolist()
    return body


_DIALECTS: dict[str, tuple[str, type[Answer]]] = {
    "triton-http": ("/v2/models/{model}/generate_stream", _TritonAnswer),
    "openai": ("/v1/completions", _OpenAiAnswer),
    "openai-chat": ("/v1/chat/completions", _OpenAiAnswer),
}
