"""Tries grammars in a process of its own, which may run out of time, memory or stack.

A grammar can make its compiler allocate gigabytes or overflow the stack, and neither can be caught in a thread. What
has been compiled here once, compiles in the engine too: there the stacks are larger and the tokens are the same.

`python -m charonia.structured.sandbox` speaks frames (8 bytes length, little-endian, then as many bytes) on its
standard streams: a `Setup` in, then `StructuredOutputsParams` in and a `Verdict` out, all JSON. It ends with its input.
"""

import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO

import msgspec
from llguidance import LLMatcher, LLTokenizer

from charonia.errors import CharoniaError, EngineDeadError, InvalidRequestError
from charonia.structured.grammar import llguidance_grammar, parser_limits, uncompilable
from charonia.structured_params import StructuredOutputsParams

MAX_CPU_SECONDS = 2.0
MAX_WALL_SECONDS = 10.0
MAX_MEMORY_BYTES = 3 << 30
"""Address space, of which the tokenizer and the interpreter take a few hundred MB."""
STACK_BYTES = 3 << 19
"""Less than any thread has in which the engine uses a grammar."""
MAX_FRAME_BYTES = 1 << 28
START_SECONDS = 60.0
_LENGTH = struct.Struct("<Q")


class Setup(msgspec.Struct, frozen=True):
    """tokenizer: the text of a tokenizer.json. The rest is as for `LLTokenizer`."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]

    def build(self) -> LLTokenizer:
        """The tokenizer. Raises whatever llguidance raises for one that it cannot use."""
        return LLTokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.eos_token_ids or None)


class Verdict(msgspec.Struct, frozen=True):
    """grammar: the text that has been compiled; None if it could not be, for the reason `error`."""

    grammar: str | None = None
    error: str = ""


class Sandbox:
    """The process, started when it is first needed and again after its death. For one thread, but for `kill`."""

    def __init__(self, python: str, setup: Setup) -> None:
        self._command = [python, "-m", "charonia.structured.sandbox"]
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    @property
    def is_started(self) -> bool:
        """Whether there is a process, which the next grammar need not wait for."""
        return self._process is not None

    def try_out(self, params: bytes) -> str:
        """Compile `StructuredOutputsParams` (JSON), and return the grammar's text.

        Raises `InvalidRequestError`, or `EngineDeadError` when the process cannot be started or gets no time to run.
        """
        process = self._process or self._start()
        try:
            _send(process, params)
            answer = _receive(process, MAX_WALL_SECONDS)
        except TimeoutError:
            # Its own limit, of CPU time, has not been reached: that is the machine's fault, not the grammar's.
            self.close()
            raise EngineDeadError(
                "structured outputs: the grammar could not be compiled in time; retry later"
            ) from None
        except OSError:
            answer = None
        if answer is None:
            self.close()
            raise uncompilable("it takes too much time, memory or depth")
        verdict = msgspec.json.decode(answer, type=Verdict)
        if verdict.grammar is None:
            raise InvalidRequestError(verdict.error)
        return verdict.grammar

    def kill(self) -> None:
        """End the process for good, from any thread: whoever waits for it waits no longer."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        if self._killed:
            process.kill()
        try:
            _send(process, msgspec.json.encode(self._setup))
            ready = _receive(process, START_SECONDS)
        except OSError:
            ready = None
        if ready is None:
            self.close()
            raise EngineDeadError("structured outputs are not available: the grammar compiler does not start")
        return process


def _send(process: "subprocess.Popen[bytes]", frame: bytes) -> None:
    assert process.stdin is not None, "opened as a pipe"
    view = memoryview(_LENGTH.pack(len(frame)) + frame)
    while view:
        view = view[process.stdin.write(view) :]


def _receive(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    """The next frame; None if it never comes. Raises `TimeoutError`."""
    assert process.stdout is not None, "opened as a pipe"
    deadline = time.monotonic() + seconds
    head = _read(process.stdout, _LENGTH.size, deadline)
    size = 0 if head is None else _LENGTH.unpack(head)[0]
    return _read(process.stdout, size, deadline) if 0 < size <= MAX_FRAME_BYTES else None


def _read(stream: IO[bytes], size: int, deadline: float) -> bytes | None:
    data = bytearray()
    poller = select.poll()
    poller.register(stream, select.POLLIN)
    while len(data) < size:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = stream.read(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


# ---- inside the process ----


def _serve() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    tokenizer: LLTokenizer | None = None
    while head := source.read(_LENGTH.size):
        frame = source.read(min(_LENGTH.unpack(head)[0], MAX_FRAME_BYTES))
        if tokenizer is None:
            tokenizer = msgspec.json.decode(frame, type=Setup).build()
            verdict = Verdict()
        else:
            # The default action of the signal is the end, whatever native code is at work.
            signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
            verdict = judge(tokenizer, frame)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        answer = msgspec.json.encode(verdict)
        sink.write(_LENGTH.pack(len(answer)) + answer)
        sink.flush()


def judge(tokenizer: LLTokenizer, frame: bytes) -> Verdict:
    """Compile, and compute the first mask, which is where much of the work is."""
    try:
        grammar = llguidance_grammar(msgspec.json.decode(frame, type=StructuredOutputsParams))
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise uncompilable(matcher.get_error())
    except CharoniaError as error:
        return Verdict(error=str(error))
    except (RecursionError, MemoryError):
        return Verdict(error=str(uncompilable("it is nested too deeply or too large")))
    return Verdict(grammar)


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
