"""Grammars over the default model's tokenizer: what they allow, and what compiling them may cost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from charonia.entrypoints.default_model import ensure_default_model
from charonia.errors import EngineDeadError, InvalidRequestError, UnsupportedError
from charonia.request import Matcher
from charonia.structured.compiler import GrammarCompiler
from charonia.structured.grammar_cache import GrammarCache
from charonia.structured.sandbox import Setup, judge
from charonia.structured.sandboxes import Sandboxes
from charonia.structured_params import StructuredOutputsParams
from charonia.text import Tokenizer

TOKENS = 49152
VOCAB = TOKENS + 100
"""Some models have logits for more tokens than their tokenizer has."""
EOS = 2
THREADS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(ensure_default_model())


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = compiler_with(sys.executable)
    yield made
    made.shutdown()


def compiler_with(python: str, directory: Path | None = None) -> GrammarCompiler:
    directory = directory or ensure_default_model()
    return GrammarCompiler(
        directory, vocab_size=VOCAB, eos_token_ids=(EOS, VOCAB + 5), python=python, num_threads=THREADS
    )


def matcher(compiler: GrammarCompiler, **form: Any) -> Matcher:
    return compiler.compile(StructuredOutputsParams(**form)).result(timeout=60)


def masks(
    compiler: GrammarCompiler, matchers: list[Matcher], suppressed: list[Collection[int]] | None = None
) -> list[set[int]]:
    words, width = compiler.fill_masks(matchers, suppressed or [()] * len(matchers))
    bits = np.unpackbits(
        np.frombuffer(words, np.uint8).reshape(len(matchers), 4 * width), axis=1, bitorder="little"
    )
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def accept(follower: Matcher, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text, add_special_tokens=False):
        follower.accept(token)


def test_only_real_tokens_and_the_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    anything = matcher(compiler, regex="(?s).*")
    (allowed,) = masks(compiler, [anything])
    assert EOS in allowed and max(allowed) < TOKENS and len(allowed) > 40_000
    assert not allowed & tokenizer.special_ids - anything.end_token_ids
    assert EOS in anything.end_token_ids and max(anything.end_token_ids) < VOCAB


def test_following(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    date = matcher(compiler, regex=r"^\d{4}-\d\d$")
    assert EOS not in masks(compiler, [date])[0] and not date.complete
    accept(date, tokenizer, "2024")
    (allowed,) = masks(compiler, [date])
    assert {tokenizer.decode([token])[0] for token in allowed} == {"-"}
    accept(date, tokenizer, "-17")
    assert date.complete and date.error is None
    date.rollback(1)
    assert not date.complete and masks(compiler, [date])[0]
    date.accept(tokenizer.encode("x", add_special_tokens=False)[0])
    assert date.error is not None and "grammar cannot be followed" in date.error and not date.complete


def test_the_end_token_ends(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    letters = matcher(compiler, regex="[ab]+")
    accept(letters, tokenizer, "ab")
    assert not letters.complete
    letters.accept(EOS)
    assert letters.complete and letters.error is None


def test_suppressed_tokens_come_where_no_other_does(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    letters, done = matcher(compiler, regex="[ab]+"), matcher(compiler, choice=["a"])
    for follower in (letters, done):
        accept(follower, tokenizer, "a")
    ends = letters.end_token_ids
    plain = masks(compiler, [letters, done])
    assert ends <= plain[0] and plain[1] == set(ends) and done.complete
    assert masks(compiler, [letters, done], [ends, ends]) == [plain[0] - ends, plain[1]]
    assert masks(compiler, [letters], [[VOCAB + 10**6]]) == [plain[0]]


def test_many_rows_are_as_each_alone(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Sequences of one grammar do not share their state."""
    texts = ["", "1", "12", "123", "1234", "1234-", "1234-5", "9", "98"] * 2
    followers = [matcher(compiler, regex=r"\d{4}-\d\d") for _ in texts]
    for follower, text in zip(followers, texts, strict=True):
        accept(follower, tokenizer, text)
    assert masks(compiler, followers) == [masks(compiler, [follower])[0] for follower in followers]


def test_schemas_without_further_properties(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for closed, complete in ((False, False), (True, True)):
        follower = matcher(compiler, json=schema, disable_additional_properties=closed)
        accept(follower, tokenizer, '{"a": 1')
        (allowed,) = masks(compiler, [follower])
        comma = tokenizer.encode(",", add_special_tokens=False)[0]
        assert (comma in allowed) is not complete


def test_whitespace(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    space = tokenizer.encode(" ", add_special_tokens=False)[0]
    for form, spaces in (({}, 32), ({"whitespace_pattern": " ?"}, 1), ({"disable_any_whitespace": True}, 0)):
        follower = matcher(compiler, json_object=True, **form)
        accept(follower, tokenizer, "{")
        for _ in range(spaces):
            follower.accept(space)
        assert follower.error is None and space not in masks(compiler, [follower])[0]


def test_errors_are_remembered_and_bounded(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match="'structured_outputs' cannot be compiled") as error:
        matcher(compiler, regex="(" * 5000)
    assert len(str(error.value)) < 500
    again = compiler.compile(StructuredOutputsParams(regex="(" * 5000))
    assert again.done() and isinstance(again.exception(), InvalidRequestError)


def test_what_nobody_waits_for_is_not_compiled(compiler: GrammarCompiler) -> None:
    matcher(compiler, regex="the tokenizer is built")
    tried: list[bytes] = []
    begun, go_on = threading.Semaphore(0), threading.Event()
    sandboxes = compiler._sandboxes
    assert sandboxes is not None

    class Gate:
        def try_out(self, params: bytes) -> str:
            tried.append(params)
            begun.release()
            assert go_on.wait(30)
            return sandboxes.try_out(params)

    compiler._sandboxes = cast(Any, Gate())
    try:
        first = [compiler.compile(StructuredOutputsParams(regex=f"first{i}")) for i in range(THREADS)]
        assert all(begun.acquire(timeout=30) for _ in first)
        left = [compiler.compile(StructuredOutputsParams(regex="left")) for _ in range(2)]
        shared = [compiler.compile(StructuredOutputsParams(regex="shared")) for _ in range(2)]
        assert all(future.cancel() for future in (*left, shared[0]))
        go_on.set()
        assert all(future.result(60).error is None for future in (*first, shared[1]))
        assert [params for params in tried if b"left" in params] == [] and len(tried) == THREADS + 1
        assert matcher(compiler, regex="left").error is None
    finally:
        compiler._sandboxes = sandboxes


def test_a_busy_machine_is_not_the_grammars_fault(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher(compiler, regex="a sandbox is started")
    with monkeypatch.context() as patched:
        patched.setattr("charonia.structured.sandbox.MAX_WALL_SECONDS", 0.2)
        stopped = sandbox_processes(compiler)
        assert stopped
        for process in stopped:
            stop(process)
        with pytest.raises(EngineDeadError, match="retry later"):
            matcher(compiler, regex="busy")
    for process in stopped:
        process.send_signal(signal.SIGCONT)
    assert matcher(compiler, regex="busy").error is None


def sandbox_processes(compiler: GrammarCompiler) -> list["subprocess.Popen[bytes]"]:
    sandboxes = sandboxes_of(compiler)._all
    return [sandbox._process for sandbox in sandboxes if sandbox._process is not None]


def sandboxes_of(compiler: GrammarCompiler) -> Sandboxes:
    assert compiler._sandboxes is not None, "there is a tokenizer"
    return compiler._sandboxes


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Until it is told to go on. The signal takes effect when one of its threads next runs."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_slow_grammar_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler_with(sys.executable)
    monkeypatch.setattr("charonia.structured.sandbox.MAX_WALL_SECONDS", 120.0)
    assert matcher(compiler, regex="quick0").error is None
    assert matcher(compiler, regex="quick1").error is None
    (only,) = sandbox_processes(compiler)
    stop(only)
    slow = compiler.compile(StructuredOutputsParams(regex="slow"))
    wait_until(lambda: len(sandboxes_of(compiler)._idle) == THREADS - 1)
    for i in range(2, 6):
        assert matcher(compiler, regex=f"quick{i}").error is None
    assert not slow.done()
    assert len(sandbox_processes(compiler)) == 2
    # Nor does one that costs a sandbox its life.
    only.kill()
    with pytest.raises(InvalidRequestError, match="too much time"):
        slow.result(60)
    assert matcher(compiler, regex="quick6").error is None
    assert len(sandbox_processes(compiler)) == 1
    compiler.shutdown()
    assert sandbox_processes(compiler) == []


def test_shutdown_with_every_thread_at_work() -> None:
    compiler = compiler_with(sys.executable)
    matcher(compiler, regex="a")
    for process in sandbox_processes(compiler):
        stop(process)
    waiting = [compiler.compile(StructuredOutputsParams(regex=f"a{i}")) for i in range(2 * THREADS)]
    compiler.shutdown()
    assert all(future.done() for future in waiting) and sandbox_processes(compiler) == []


def test_what_the_cache_forgets() -> None:
    class Item:
        def __init__(self, num_bytes: int) -> None:
            self.num_bytes = num_bytes

    cache: GrammarCache[Item] = GrammarCache(max_items=3, max_bytes=100)
    for key in (b"a", b"b", b"c"):
        cache.put(key, Item(10))
    assert cache.get(b"a") is not None
    cache.put(b"d", Item(10))
    assert cache.get(b"b") is None and len(cache) == 3
    cache.put(b"e", Item(75))
    assert [cache.get(key) is not None for key in (b"c", b"a", b"d", b"e")] == [False, True, True, True]
    grown = cache.get(b"a")
    assert grown is not None
    grown.num_bytes = 30
    cache.put(b"d", Item(20))
    assert cache.get(b"e") is None and cache.get(b"a") is grown
    cache.put(b"f", Item(1000))
    assert len(cache) == 1 and cache.get(b"f") is not None


def test_large_grammars_are_forgotten_before_small_ones_would_be(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_compiled", GrammarCache(max_items=100, max_bytes=3_000_000))
    for i in range(12):
        assert matcher(compiler, regex=f"small{i}").error is None
    assert len(compiler._compiled) == 12
    for i in range(3):
        assert matcher(compiler, choice=[f"{i} {j:02}" + "x" * 100 for j in range(100)]).error is None
    assert len(compiler._compiled) < 6
    assert matcher(compiler, regex="small0").error is None


def test_the_judge_in_the_sandbox() -> None:
    path = ensure_default_model() / "tokenizer.json"
    tokenizer = Setup(path.read_text(), TOKENS, [EOS]).build()

    def verdict(**form: Any) -> Any:
        return judge(tokenizer, msgspec.json.encode(StructuredOutputsParams(**form)))

    assert verdict(grammar='root ::= "a" | "b"').grammar.startswith("%llguidance")
    assert verdict(choice=["a", 'b"']).grammar == 'start: "a" | "b\\""'
    assert "Unimplemented keys" in verdict(json={"not": {"type": "string"}}).error
    assert verdict(grammar="root ::= " + "(" * 5000).grammar is None


def test_a_sandbox_that_does_not_start() -> None:
    compiler = compiler_with("/bin/false")
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="does not start"):
            matcher(compiler, regex="a")
    compiler.shutdown()


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    compiler = compiler_with(sys.executable, tmp_path)
    with pytest.raises(UnsupportedError, match="not available for this model's tokenizer"):
        matcher(compiler, regex="a")
    compiler.shutdown()
