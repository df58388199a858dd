"""The line of a request that has ended, and the thread that writes it."""

import json
import shlex
import threading
import time
from typing import Any

import pytest
from charonia.errors import CharoniaError, InvalidRequestError
from charonia.outputs import RequestTimings
from charonia.serving.request import ChatInput, GenerationRequest
from charonia.triton.reporter import MAX_WAITING, RequestReporter
from charonia.triton.request_log import RequestLog, logfmt
from charonia.triton.request_record import RequestRecord

SECRET = "my secret prompt"


def record(**changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "request_id": "r-1", "arrival": 100.0, "ended": 102.25, "streamed": True, "num_sequences": 2,
        "timings": RequestTimings(queue=0.25, first_token=0.5, total=2.0), "num_prompt_tokens": 7,
        "num_cached_tokens": 4, "num_generation_tokens": 31, "finish_reasons": ("stop", "length"),
        "generation": GenerationRequest(prompt=SECRET),
    }  # fmt: skip
    return RequestRecord(**values | changes)


def line(entry: RequestRecord, *, with_texts: bool = False) -> str:
    lines: list[str] = []
    RequestLog(lines.append, "llm", with_texts=with_texts)(entry)
    (written,) = lines
    assert "\n" not in written
    return written


def parsed(text: str) -> dict[str, str]:
    """As logfmt readers do: a value is plain, or a JSON string."""
    kind, *pairs = shlex.split(text, posix=False)
    assert kind == "request"
    values = dict(pair.split("=", 1) for pair in pairs)
    return {key: json.loads(value) if value.startswith('"') else value for key, value in values.items()}


def test_a_request_that_ended_well() -> None:
    assert parsed(line(record())) == {
        "model": "llm", "id": "r-1", "outcome": "length", "finish_reasons": "stop,length", "stream": "true",
        "sequences": "2", "prompt_tokens": "7", "cached_tokens": "4", "generation_tokens": "31",
        "queue_s": "0.250000", "ttft_s": "0.500000", "total_s": "2.250000",
    }  # fmt: skip


def test_a_request_that_failed() -> None:
    error = InvalidRequestError(f"parameter 'x' must not be {SECRET}")
    fields = parsed(line(record(error=error, refused=True, generation=None, finish_reasons=())))
    assert (fields["outcome"], fields["error_code"], fields["refused"]) == (
        "invalid_arg",
        "INVALID_ARG",
        "true",
    )
    assert "finish_reasons" not in fields


@pytest.mark.parametrize("error", [None, CharoniaError(f"no {SECRET}")])
def test_texts_are_written_only_where_they_are_wanted(error: CharoniaError | None) -> None:
    entry = record(error=error)
    assert SECRET not in line(entry)
    fields = line(entry, with_texts=True)
    assert f'prompt="{SECRET}"' in fields
    assert (f'error="no {SECRET}"' in fields) == (error is not None)


def test_texts_are_cut() -> None:
    chat = GenerationRequest(prompt=ChatInput(messages=[{"role": "user", "content": "a" * 10_000}]))
    assert "aaaa" in line(record(generation=chat), with_texts=True)
    for generation in (chat, GenerationRequest(prompt=[1] * 100_000), GenerationRequest(prompt="b" * 10_000)):
        assert len(line(record(generation=generation), with_texts=True)) < 3000
    assert len(line(record(request_id="i" * 10_000))) < 500


@pytest.mark.parametrize(
    ("value", "text"),
    [("a b", '"a b"'), ("", '""'), ('say "x"\n=', r'"say \"x\"\n="'), ("é", r'"\u00e9"'), (True, "true")],
)
def test_values(value: object, text: str) -> None:
    assert logfmt({"key": value}) == f"key={text}"


def test_the_reporter_never_makes_anyone_wait() -> None:
    blocked, seen, warnings = threading.Event(), [], []

    def slow(entry: RequestRecord) -> None:
        blocked.wait(10)
        seen.append(entry)

    reporter = RequestReporter([slow], warnings.append)
    begin = time.monotonic()
    for _ in range(MAX_WAITING + 100):
        reporter.note(record())
    assert time.monotonic() - begin < 5
    blocked.set()
    reporter.stop()
    dropped = MAX_WAITING + 100 - len(seen)
    assert 99 <= dropped <= 100
    assert len(warnings) == 1 and f"{dropped} ended requests" in warnings[0]


def test_a_sink_that_fails_stops_nobody() -> None:
    seen, warnings = [], []

    def broken(_: RequestRecord) -> None:
        raise RuntimeError("oops")

    reporter = RequestReporter([broken, seen.append], warnings.append)
    reporter.note(record())
    reporter.note(record())
    reporter.stop()
    assert len(seen) == 2 and "oops" in warnings[0]
    idle = RequestReporter([], warnings.append)
    idle.note(record())
    idle.stop()
