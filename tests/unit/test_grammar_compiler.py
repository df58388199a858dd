"""Grammars over the default model's tokenizer: what they allow, and what compiling them may cost."""

import signal
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from charonia.entrypoints.default_model import ensure_default_model
from charonia.errors import EngineDeadError, InvalidRequestError, UnsupportedError
from charonia.request import Matcher
from charonia.structured.compiler import GrammarCompiler
from charonia.structured.sandbox import Setup, judge
from charonia.structured_params import StructuredOutputsParams
from charonia.text import Tokenizer

TOKENS = 49152
VOCAB = TOKENS + 100
"""Some models have logits for more tokens than their tokenizer has."""
EOS = 2


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
    return GrammarCompiler(directory, vocab_size=VOCAB, eos_token_ids=(EOS, VOCAB + 5), python=python)


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
    tried: list[bytes] = []
    begun, go_on = threading.Event(), threading.Event()
    sandbox = compiler._sandbox
    assert sandbox is not None

    class Gate:
        def try_out(self, params: bytes) -> str:
            tried.append(params)
            begun.set()
            assert go_on.wait(30)
            return sandbox.try_out(params)

    compiler._sandbox = cast(Any, Gate())
    try:
        first = compiler.compile(StructuredOutputsParams(regex="first"))
        assert begun.wait(30)
        left = [compiler.compile(StructuredOutputsParams(regex="left")) for _ in range(2)]
        shared = [compiler.compile(StructuredOutputsParams(regex="shared")) for _ in range(2)]
        assert all(future.cancel() for future in (*left, shared[0]))
        go_on.set()
        assert first.result(60).error is None and shared[1].result(60).error is None
        assert [params for params in tried if b"left" in params] == [] and len(tried) == 2
        assert matcher(compiler, regex="left").error is None
    finally:
        compiler._sandbox = sandbox


def test_a_busy_machine_is_not_the_grammars_fault(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher(compiler, regex="started")
    with monkeypatch.context() as patched:
        patched.setattr("charonia.structured.sandbox.MAX_WALL_SECONDS", 0.2)
        assert compiler._sandbox is not None and compiler._sandbox._process is not None
        compiler._sandbox._process.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="retry later"):
            matcher(compiler, regex="busy")
    assert matcher(compiler, regex="busy").error is None


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
