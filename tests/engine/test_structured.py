"""Outputs of a prescribed form, from a random model: what keeps to the form does so because it must."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from charonia import LLM, SamplingParams, StructuredOutputsParams
from charonia.errors import CharoniaError, InvalidRequestError, UnsupportedError
from charonia.outputs import CompletionOutput
from charonia.structured_params import MAX_REGEX_CHARS
from charonia.worker import sampling
from charonia.worker.batch import SampledRow
from charonia.worker.rows import RequestRows
from charonia.worker.sampler import sample
from support.core_driver import CoreDriver

PROMPT = "Once upon a time"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = {"json": SCHEMA, "disable_any_whitespace": True}
DATE = r"\d{4}-\d{2}-\d{2}"
LETTERS = {"regex": "[a-z]+"}


def params(form: dict[str, Any] | None, **fields: Any) -> SamplingParams:
    constraint = None if form is None else StructuredOutputsParams(**form)
    return SamplingParams(**{"max_tokens": 120, "structured_outputs": constraint, **fields})


def run(llm: LLM, *requests: SamplingParams) -> list[list[CompletionOutput]]:
    outputs = llm.generate([PROMPT] * len(requests), list(requests), use_tqdm=False)
    return [output.outputs for output in outputs]


def texts(outputs: list[list[CompletionOutput]]) -> list[str]:
    return [output.text for sequences in outputs for output in sequences]


def test_schema(llm: LLM) -> None:
    forms = [COMPACT, {"json": json.dumps(SCHEMA)}]
    outputs = run(llm, *(params(form, seed=seed) for form in forms for seed in range(6)))
    for (output,) in outputs:
        assert output.finish_reason == "stop" and output.stop_reason is None
        value = json.loads(output.text)
        assert set(value) == {"name", "age", "tags"} and len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150 and len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b", 3}
    assert len(set(texts(outputs))) == len(outputs), "every seed has its own"
    assert not any(re.search(r"\s", re.sub(r'"[^"]*"', "", text)) for text in texts(outputs[:6]))


def test_regex_choice_and_grammars(llm: LLM) -> None:
    gbnf = 'root ::= "<" item ("," item)* ">"\nitem ::= [0-9] [0-9]?'
    lark = 'start: "<" ITEM ("," ITEM)* ">"\nITEM: /[0-9][0-9]?/'
    choices = ["red", "green", 'a "quoted" one', "blé\n"]
    requests = [
        *(params({"regex": DATE}, seed=seed) for seed in range(4)),
        *(params({"choice": choices}, seed=seed, top_k=5) for seed in range(4)),
        *(params({"grammar": text}, seed=seed) for text in (gbnf, lark) for seed in range(4)),
    ]
    found = texts(run(llm, *requests))
    assert all(re.fullmatch(DATE, text) for text in found[:4])
    assert set(found[4:8]) <= set(choices)
    assert all(re.match(r"<\d\d?(,\d\d?)*>?", text) for text in found[8:])
    (any_object,) = texts(run(llm, params({"json_object": True, "disable_any_whitespace": True}, seed=1)))
    assert any_object.startswith(('{"', "{}"))


def test_many_sequences_with_everything_else(llm: LLM) -> None:
    asked = params(
        {"regex": DATE}, n=3, seed=5, logprobs=2, repetition_penalty=1.3, presence_penalty=0.5, top_p=0.9,
        logit_bias={33: 3.0}, min_tokens=2,
    )  # fmt: skip
    (sequences,) = run(llm, asked)
    assert len({sequence.text for sequence in sequences}) == 3
    for sequence in sequences:
        assert re.fullmatch(DATE, sequence.text) and sequence.text.isascii()
        assert sequence.logprobs is not None and len(sequence.logprobs) == len(sequence.token_ids)
        # Those of the distribution before any mask: the likeliest tokens are mostly no digits.
        assert all(len(position) in (2, 3) for position in sequence.logprobs)
    ranks = [
        position[token].rank
        for s in sequences
        for token, position in zip(s.token_ids, s.logprobs or [], strict=True)
    ]
    assert max(ranks) > 3


def test_ends(llm: LLM) -> None:
    (stopped,), (cut,), (going,), (ended,) = run(
        llm,
        params({"regex": "[ab]+"}, seed=1, stop=["ba"], include_stop_str_in_output=True, ignore_eos=True),
        params(LETTERS, seed=1, max_tokens=5, ignore_eos=True),
        params({"choice": ["a", "aaaaaaaa"]}, temperature=0.0, ignore_eos=True),
        params({"choice": ["abcd"]}, temperature=0.0, min_tokens=100),
    )
    assert stopped.stop_reason == "ba" and stopped.text.endswith("ba") and stopped.text.count("ba") == 1
    assert cut.finish_reason == "length" and len(cut.token_ids) == 5
    assert going.text == "aaaaaaaa" and ended.text == "abcd"
    assert going.finish_reason == ended.finish_reason == "stop"


def test_a_grammar_whose_next_tokens_are_all_excluded(llm: LLM) -> None:
    seven = llm.get_tokenizer().encode("7", add_special_tokens=False)
    with pytest.raises(InvalidRequestError, match=r"'structured_outputs'.*leaves none"):
        run(llm, params(None), params({"regex": "77a"}, allowed_token_ids=seven))
    assert texts(run(llm, params({"regex": "77"}, allowed_token_ids=seven))) == ["77"]


def test_rows_without_a_grammar_are_not_touched(llm: LLM) -> None:
    plain = [params(None, seed=seed, ignore_eos=True, max_tokens=12) for seed in range(5)]
    alone = run(llm, *plain)
    mixed = [item for one in plain for item in (one, params(LETTERS, seed=3, max_tokens=30))]
    together = run(llm, *mixed)
    assert [o[0].token_ids for o in together[::2]] == [o[0].token_ids for o in alone]
    assert len({o[0].text for o in together[1::2]}) == 1


@pytest.fixture(scope="module")
def small_llm(tiny_dir: Path) -> Iterator[LLM]:
    """Steps without lookahead, and a cache that holds no two long sequences: requests are preempted."""
    settings = {
        "max_model_len": 150,
        "num_kv_blocks_override": 11,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 32,
    }
    with LLM(str(tiny_dir), load_format="dummy", dtype="float32", cpu_threads=2, async_scheduling=False,
             **settings) as llm:  # fmt: skip
        yield llm


def test_lookahead_and_preemption_change_nothing(llm: LLM, small_llm: LLM) -> None:
    requests = [
        *(params(COMPACT, seed=seed, max_tokens=60) for seed in range(3)),
        *(params(LETTERS, temperature=0.0, ignore_eos=True, max_tokens=40 + i) for i in range(3)),
    ]
    # Once compiled, they all begin at the same time.
    run(small_llm, params(COMPACT, max_tokens=1), params(LETTERS, max_tokens=1))
    before = small_llm.stats().preemptions
    expected = [o[0].token_ids for o in run(llm, *requests)]
    assert [o[0].token_ids for o in run(small_llm, *requests)] == expected
    assert small_llm.stats().preemptions > before


BOMBS: dict[str, dict[str, Any]] = {
    "a multiple that takes gigabytes": {"json": {"type": "integer", "multipleOf": 7919 * 7907}},
    "rules that overflow the stack": {
        "grammar": "start: a0\n" + "\n".join(f'a{i}: "x{i}" a{i + 1}?' for i in range(2900)) + '\na2900: "z"'
    },
    "alternatives that multiply": {
        "json": {"allOf": [{"anyOf": [{"type": "object", "properties": {f"k{i}_{j}": {"minimum": j}}}
                                      for j in range(6)]} for i in range(7)]},
    },
    "parentheses": {"grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000},
    "a regex of parentheses": {"regex": "(" * 8000 + "a" + ")" * 8000},
    "a schema that is only itself": {"json": {"$ref": "#"}},
}  # fmt: skip
FAULTS: dict[str, dict[str, Any]] = {
    "regex": {"regex": "(a"},
    "lark": {"grammar": "start: foo"},
    "gbnf": {"grammar": 'item ::= "a"'},
    "look-ahead": {"regex": "(?=a)b"},
    "unsupported keyword": {"json": {"type": "array", "uniqueItems": True}},
    "bad type": {"json": {"type": "number!"}},
    "whitespace": {"json": SCHEMA, "whitespace_pattern": "("},
}


@pytest.mark.parametrize("name", [*BOMBS, *FAULTS])
def test_what_cannot_be_compiled(llm: LLM, name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidRequestError, match="'structured_outputs' cannot be compiled: "):
        run(llm, params({**BOMBS, **FAULTS}[name]))
    assert time.monotonic() - begin < 30
    begin = time.monotonic()
    with pytest.raises(InvalidRequestError):
        run(llm, params({**BOMBS, **FAULTS}[name]))
    assert time.monotonic() - begin < 1, "it is remembered"
    assert re.fullmatch(DATE, texts(run(llm, params({"regex": DATE}, seed=0)))[0])


def test_regexes_that_others_choke_on(llm: LLM) -> None:
    patterns = ["(a|b)*a(a|b){2000}", "(a+)+b", "((a{1,1000}){1,1000}){1,1000}", "a" * MAX_REGEX_CHARS]
    asked = [params({"regex": pattern}, seed=1, max_tokens=6) for pattern in patterns]
    try:
        found = texts(run(llm, *asked))
    except CharoniaError as error:
        pytest.fail(str(error))
    assert all(re.fullmatch("[ab]+", text) for text in found)


def test_without_a_tokenizer(tiny_dir: Path) -> None:
    settings = {"load_format": "dummy", "dtype": "float32", "cpu_threads": 1, "skip_tokenizer_init": True}
    with (
        LLM(str(tiny_dir), **settings, max_model_len=64) as llm,
        pytest.raises(UnsupportedError, match="tokenizer"),
    ):
        llm.generate([[1, 2, 3]], params(LETTERS), use_tqdm=False)


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_logits_of_plain_rows_beside_constrained_ones(
    tiny_dir: Path, lookahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit those of the same batch without constraints, and so are the tokens."""
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def noting(logits: torch.Tensor, rows: RequestRows, sampled: list[SampledRow], *rest: Any) -> Any:
        for i, item in enumerate(sampled):
            seen[rows[item.row].seed, item.position] = logits[i].clone()
        return sample(logits, rows, sampled, *rest)

    monkeypatch.setattr(sampling, "sample", noting)
    driver = CoreDriver(
        tiny_dir, load_format="dummy", max_model_len=64, max_num_seqs=8, max_num_batched_tokens=16,
        async_scheduling=lookahead,
    )  # fmt: skip

    def run_beside(form: dict[str, Any] | None) -> list[list[int]]:
        """Tokens of the requests with even seeds, which are plain."""
        seen.clear()
        ids = []
        for i in range(8):
            asked = params(form if i % 2 else None, temperature=0.4 * (i % 3), ignore_eos=True)
            ids.append(driver.add([3 + i] * (3 + i), 12, asked, seed=i, cache_salt=str(form)))
        driver.drain()
        assert all(len(driver.sequels[i].token_ids) == 12 for i in ids)
        return [driver.sequels[i].token_ids for i in ids[::2]]

    try:
        # Once compiled, the grammar keeps nobody waiting.
        driver.add([5], 1, params(LETTERS, max_tokens=1))
        driver.drain()
        tokens, logits = run_beside(None), dict(seen)
        assert run_beside(LETTERS) == tokens
    finally:
        driver.core.shutdown()
    assert logits.keys() == seen.keys() and len(logits) == 8 * 12
    assert all(torch.equal(logits[place], seen[place]) for place in logits if place[0] % 2 == 0)
    assert not all(torch.equal(logits[place], seen[place]) for place in logits)
