"""Deltas of the engine to deltas for the client."""

import pytest
from charonia.outputs import CompletionOutput, FinishReason, Logprob, TokenLogprobs
from charonia.request import TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.text import SequenceProcessor, Tokenizer, convert_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_tokenizers import gpt2_like

TOKENIZER = Tokenizer(gpt2_like(), special_tokens={"eos_token": "<|end|>"})
EOS = TOKENIZER.eos_token_id
assert EOS is not None


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def processor(params: SamplingParams | None = None, **options: frozenset[int]) -> SequenceProcessor:
    return SequenceProcessor(0, TOKENIZER, params or SamplingParams(), ids("prompt"), **options)


def delta(token_ids: list[int], **fields: object) -> TokenDelta:
    return TokenDelta(request_id=1, token_ids=token_ids, **fields)  # type: ignore[arg-type]


def logprobs_of(token_ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs([i, 40, 41], [-float(i), -0.5, -1.5], 7) for i in token_ids]


def merge(a: CompletionOutput, b: CompletionOutput) -> CompletionOutput:
    """Two consecutive deltas of one sequence as one."""
    return CompletionOutput(
        index=a.index,
        text=a.text + b.text,
        token_ids=a.token_ids + b.token_ids,
        cumulative_logprob=b.cumulative_logprob,
        logprobs=None
        if a.logprobs is None and b.logprobs is None
        else (a.logprobs or []) + (b.logprobs or []),
        finish_reason=b.finish_reason,
        stop_reason=b.stop_reason,
    )


def run(sequence: SequenceProcessor, deltas: list[TokenDelta]) -> CompletionOutput:
    """Everything shown, merged."""
    shown = [output for output in map(sequence.push, deltas) if output is not None]
    assert all(output.text or output.finished for output in shown)
    total = shown[0]
    for output in shown[1:]:
        total = merge(total, output)
    return total


def test_one_token_one_delta() -> None:
    sequence = processor()
    a, b = ids("ab")
    assert sequence.push(delta([a])) == CompletionOutput(0, "a", [a])
    assert sequence.push(delta([b], finish_reason=FinishReason.LENGTH)) == CompletionOutput(
        0, "b", [b], finish_reason=FinishReason.LENGTH
    )
    assert sequence.finished
    assert sequence.push(delta([a])) is None


def test_tokens_of_half_a_character_wait_for_the_rest() -> None:
    sequence = processor(SamplingParams(logprobs=0))
    first, second = ids("é")
    assert sequence.push(delta([first], logprobs=logprobs_of([first]))) is None
    output = sequence.push(delta([second], logprobs=logprobs_of([second])))
    assert output is not None
    assert (output.text, output.token_ids) == ("é", [first, second])
    assert output.logprobs is not None and len(output.logprobs) == 2
    assert output.cumulative_logprob == -first - second


def test_the_end_replaces_half_a_character() -> None:
    sequence = processor()
    output = sequence.push(delta(ids("aé")[:2], finish_reason=FinishReason.LENGTH))
    assert output is not None and output.text == "a\ufffd"


def test_nothing_to_show_without_tokens() -> None:
    assert processor().push(delta([], prompt_logprobs=logprobs_of([1]))) is None
    assert processor(SamplingParams(detokenize=False)).push(delta([])) is None


def test_abort_shows_what_was_held_back() -> None:
    sequence = processor(SamplingParams(stop=["stop"]))
    held = ids("sto")
    assert sequence.push(delta(held)) is None
    output = sequence.push(delta([], finish_reason=FinishReason.ABORT))
    assert output == CompletionOutput(0, "sto", held, finish_reason=FinishReason.ABORT)


def test_without_detokenizing_every_token_shows() -> None:
    sequence = processor(SamplingParams(detokenize=False))
    first = ids("é")[0]
    assert sequence.push(delta([first])) == CompletionOutput(0, "", [first])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_the_text_and_keeps_its_tokens(include: bool) -> None:
    sequence = processor(SamplingParams(stop=["###"], include_stop_str_in_output=include, logprobs=0))
    tokens = ids("ab###cd")
    output = sequence.push(delta(tokens, logprobs=logprobs_of(tokens)))
    assert output is not None
    assert output.text == ("ab###" if include else "ab")
    assert output.token_ids == ids("ab###")
    assert output.logprobs is not None and len(output.logprobs) == 5
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "###")
    assert sequence.stopped_by_text and sequence.finished


def test_a_stop_string_in_the_engines_last_delta_needs_no_abort() -> None:
    sequence = processor(SamplingParams(stop=["b"]))
    output = sequence.push(delta(ids("ab"), finish_reason=FinishReason.LENGTH))
    assert output is not None
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", FinishReason.STOP, "b")
    assert not sequence.stopped_by_text


def test_min_tokens_come_before_stop_strings() -> None:
    sequence = processor(SamplingParams(stop=["x"], min_tokens=3))
    output = sequence.push(delta(ids("axaxax")))
    assert output is not None
    assert (output.text, output.token_ids) == ("axa", ids("axax"))


@pytest.mark.parametrize("skip", [False, True])
def test_an_end_token_is_silent(skip: bool) -> None:
    sequence = processor(SamplingParams(skip_special_tokens=skip))
    output = sequence.push(delta([*ids("a"), EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert output == CompletionOutput(0, "a", [*ids("a"), EOS], finish_reason=FinishReason.STOP)


def test_a_stop_token_is_the_reason_and_no_text() -> None:
    stop = ids("z")[0]
    for include in (False, True):
        sequence = processor(SamplingParams(stop_token_ids=[stop], include_stop_str_in_output=include))
        output = sequence.push(delta(ids("az"), finish_reason=FinishReason.STOP, stop_token_id=stop))
        assert output is not None
        assert output.text == ("az" if include else "a")
        assert (output.token_ids, output.stop_reason) == (ids("az"), stop)


def test_a_stop_token_is_no_part_of_a_stop_string() -> None:
    stop = ids("z")[0]
    sequence = processor(SamplingParams(stop=["az"], stop_token_ids=[stop]))
    output = sequence.push(delta(ids("az"), finish_reason=FinishReason.STOP, stop_token_id=stop))
    assert output is not None and (output.text, output.stop_reason) == ("a", stop)


def test_end_tokens_that_the_caller_knows() -> None:
    stop = ids("z")[0]
    last = delta(ids("z"), finish_reason=FinishReason.STOP, stop_token_id=stop)
    output = processor(eos_token_ids=frozenset((stop,))).push(last)
    assert output is not None and output.stop_reason is None
    output = processor(SamplingParams(stop_token_ids=[stop]), eos_token_ids=frozenset((stop,))).push(last)
    assert output is not None and output.stop_reason == stop


def test_an_end_token_that_was_ignored_waits_without_text() -> None:
    sequence = processor(SamplingParams(ignore_eos=True))
    assert sequence.push(delta([EOS])) is None
    assert sequence.push(delta(ids("a"))) == CompletionOutput(0, "a", [EOS, *ids("a")])


@given(
    text=st.text("abé#😀", max_size=20),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    stop=st.lists(st.sampled_from(["a#", "#", "##", "é", "ba"]), max_size=2),
    min_tokens=st.integers(0, 6),
    logprobs=st.sampled_from([None, 2]),
)
@settings(max_examples=200, deadline=None)
def test_grouping_of_tokens_makes_no_difference(
    text: str, sizes: list[int], stop: list[str], min_tokens: int, logprobs: int | None
) -> None:
    params = SamplingParams(stop=stop, min_tokens=min_tokens, logprobs=logprobs)
    tokens = ids(text)
    outputs = []
    for cut in ([1], sizes):
        deltas, begin, i = [], 0, 0
        while begin < len(tokens):
            chunk = tokens[begin : begin + cut[i % len(cut)]]
            deltas.append(delta(chunk, logprobs=logprobs_of(chunk) if logprobs else None))
            begin, i = begin + len(chunk), i + 1
        deltas.append(delta([], finish_reason=FinishReason.LENGTH))
        outputs.append(run(processor(params), deltas))
    assert outputs[0] == outputs[1]
    assert logprobs is None or len(outputs[0].logprobs or []) == len(outputs[0].token_ids)
    if outputs[0].stop_reason is None:
        assert (outputs[0].text, outputs[0].token_ids) == (text, tokens)


def test_logprobs_name_tokens_and_ranks() -> None:
    a, b, c = ids("abc")
    half = ids("é")[0]
    assert convert_logprobs(TOKENIZER, TokenLogprobs([half, a, b], [-9.0, -1.0, -2.0], 30)) == {
        half: Logprob(-9.0, 30, "\ufffd"),
        a: Logprob(-1.0, 1, "a"),
        b: Logprob(-2.0, 2, "b"),
    }
    assert list(convert_logprobs(TOKENIZER, TokenLogprobs([b, a, b], [-2.0, -1.0, -2.0], 2)).items()) == [
        (b, Logprob(-2.0, 2, "b")),
        (a, Logprob(-1.0, 1, "a")),
    ]
    assert convert_logprobs(TOKENIZER, TokenLogprobs([c], [-3.0], 5)) == {c: Logprob(-3.0, 5, "c")}


def test_ranks_are_unique_among_equals() -> None:
    a, b, c = ids("abc")
    among = convert_logprobs(TOKENIZER, TokenLogprobs([b, a, b], [-1.0, -1.0, -1.0], 1))
    assert {i: entry.rank for i, entry in among.items()} == {b: 2, a: 1}
    beyond = convert_logprobs(TOKENIZER, TokenLogprobs([c, a, b], [-1.0, -1.0, -1.0], 1))
    assert {i: entry.rank for i, entry in beyond.items()} == {c: 3, a: 1, b: 2}


# ---- everything in the end ----


@settings(deadline=None)
@given(st.text(max_size=20), st.integers(1, 4), st.booleans(), st.booleans())
def test_final_only_shows_the_same_in_the_end(
    text: str, size: int, with_stop: bool, with_logprobs: bool
) -> None:
    params = SamplingParams(stop=["ab"] if with_stop else [], logprobs=0 if with_logprobs else None)
    token_ids = [*ids(text), *ids("z")]
    groups = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    deltas = [
        delta(
            group,
            logprobs=logprobs_of(group) if with_logprobs else None,
            finish_reason=FinishReason.LENGTH if group is groups[-1] else None,
        )
        for group in groups
    ]
    sequence = SequenceProcessor(0, TOKENIZER, params, ids("prompt"), final_only=True)
    shown = [output for output in map(sequence.push, deltas) if output is not None]
    assert shown == [run(processor(params), deltas)]


def test_plain_tokens_may_be_appended_directly() -> None:
    sequence = SequenceProcessor(0, None, SamplingParams(detokenize=False), [1], final_only=True)
    assert sequence.push(delta([5])) is None
    plain = sequence.plain_token_ids
    assert plain is not None
    plain += [6, 7]
    assert sequence.push(delta([8], finish_reason=FinishReason.LENGTH)) == CompletionOutput(
        0, "", [5, 6, 7, 8], finish_reason=FinishReason.LENGTH
    )


def test_text_that_waits_for_the_end_hides_the_end_token_and_half_characters() -> None:
    sequence = SequenceProcessor(0, TOKENIZER, SamplingParams(), ids("prompt"), final_only=True)
    plain = sequence.plain_token_ids
    assert plain is not None
    plain += [*ids("é"), *ids("é")[:1]]
    end = delta([EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS)
    output = sequence.push(end)
    assert output is not None
    assert output.text == "é\ufffd"
    assert output.token_ids[-1] == EOS


def test_tokens_that_need_more_are_not_plain() -> None:
    for params, final_only in (
        (SamplingParams(detokenize=False, logprobs=0), True),
        (SamplingParams(stop=["x"]), True),
        (SamplingParams(), False),
        (SamplingParams(detokenize=False), False),
    ):
        sequence = SequenceProcessor(0, TOKENIZER, params, [1], final_only=final_only)
        assert sequence.plain_token_ids is None
