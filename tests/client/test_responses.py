"""From output tensors to results, and joining chunks."""

import json
import time

import pytest
from charonia_client import GenerateResult, InternalServerError, Logprob, StreamChunk, Timings, Usage
from charonia_client.responses import ModelResponse, parse, single


def response(**outputs):
    return ModelResponse("llm", "1", "r", outputs)


def chunk(text, reason="None", ids=(), **more):
    outputs = {"num_input_tokens": [4], "num_output_tokens": [len(ids)], "token_ids": list(ids), **more}
    return parse(StreamChunk, response(text_output=[text], finish_reason=[reason], **outputs), url="u")


def test_every_field_is_read():
    logprobs = [
        {
            "7": {"logprob": -0.5, "rank": 2, "decoded_token": "a"},
            "3": {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
        }
    ]
    result = parse(
        GenerateResult,
        response(
            text_output=["a"],
            finish_reason=["stop"],
            token_ids=[7],
            logprobs=[json.dumps(logprobs)],
            cumulative_logprob=[-0.5],
            num_input_tokens=[3],
            num_output_tokens=[1],
            timings=['{"queue_s": 0.5, "total_s": 2, "num_cached_tokens": 16, "unknown": 1}'],
        ),
        url="u",
    )
    assert (result.text, result.finish_reason, result.token_ids) == ("a", "stop", (7,))
    assert result.logprobs == ({7: Logprob(-0.5, 2, "a"), 3: Logprob(-0.1, 1, "b")},)
    assert list(result.logprobs[0]) == [7, 3]
    assert result.cumulative_logprob == -0.5
    assert result.usage == Usage(3, 1)
    assert result.timings == Timings(queue_s=0.5, total_s=2, num_cached_tokens=16)
    assert (result.request_id, result.model, result.model_version) == ("r", "llm", "1")


def test_a_server_that_reports_only_text_is_enough():
    result = parse(GenerateResult, response(text_output=["x"]), url="u")
    assert result.text == "x"
    assert (result.usage, result.token_ids, result.logprobs, result.finish_reason) == (None, None, None, None)


def test_token_ids_of_several_sequences_are_split_by_their_lengths():
    result = parse(
        GenerateResult,
        response(
            text_output=["a", "", "c"],
            finish_reason=["None", "stop", "length"],
            token_ids=[1, 2, 3],
            num_output_tokens=[2, 0, 1],
            logprobs=["null"] * 3,
        ),
        url="u",
    )
    assert [s.token_ids for s in result.sequences] == [(1, 2), (), (3,)]
    assert [s.finish_reason for s in result.sequences] == [None, "stop", "length"]
    assert [s.logprobs for s in result.sequences] == [None] * 3


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"text_output": []},
        {"text_output": ["a", "b"], "finish_reason": ["stop"]},
        {"text_output": ["a", "b"], "token_ids": [1, 2, 3], "num_output_tokens": [1, 1]},
        {"text_output": ["a", "b"], "token_ids": [1, 2]},
        {"text_output": ["a"], "logprobs": ["[{]"]},
        {"text_output": ["a"], "logprobs": ['[{"1": {"logprob": 1}}]']},
    ],
)
def test_outputs_against_the_contract_are_the_servers_fault(outputs):
    with pytest.raises(InternalServerError, match="serving contract"):
        parse(StreamChunk, response(**outputs), url="u")


def test_a_complete_answer_is_one_response():
    one = response(text_output=["a"])
    assert single([one], url="u", model="llm").text == "a"
    for responses in ([], [one, one]):
        with pytest.raises(InternalServerError, match="one response"):
            single(responses, url="u", model="llm")


def test_chunks_join_to_the_result():
    chunks = [
        chunk("Hel", ids=(1, 2), cumulative_logprob=[-1.0], logprobs=["[{}, {}]"]),
        chunk(
            "lo", "stop", ids=(3,), cumulative_logprob=[-1.5], logprobs=["[{}]"], timings=['{"total_s": 1}']
        ),
    ]
    result = GenerateResult.from_chunks(chunks)
    assert type(result) is GenerateResult
    assert (result.text, result.token_ids, result.finish_reason) == ("Hello", (1, 2, 3), "stop")
    assert result.usage == Usage(4, 3)
    assert result.cumulative_logprob == -1.5
    assert len(result.logprobs) == 3
    assert result.timings == Timings(total_s=1)


def test_joining_many_chunks_takes_linear_time():
    """Joined one after the other they take minutes."""
    chunks = [chunk("word ", ids=(i,), logprobs=["[{}]"]) for i in range(100_000)]
    before = time.process_time()
    result = GenerateResult.from_chunks(chunks)
    assert time.process_time() - before < 10
    assert (len(result.text), len(result.token_ids), result.usage.num_output_tokens) == (
        500_000,
        100_000,
        100_000,
    )


def test_chunks_of_several_sequences():
    def pair(first, second):
        return parse(StreamChunk, response(text_output=[first, second]), url="u")

    result = GenerateResult.from_chunks([pair("a", "x"), pair("b", "")])
    assert [sequence.text for sequence in result.sequences] == ["ab", "x"]
    assert (result.token_ids, result.usage, result.finish_reason) == (None, None, None)
    with pytest.raises(ValueError, match="shorter"):
        GenerateResult.from_chunks([pair("a", "x"), chunk("b")])


def test_a_sequence_that_ended_keeps_its_reason():
    assert GenerateResult.from_chunks([chunk("a", "stop"), chunk("")]).finish_reason == "stop"


def test_prompt_logprobs_and_stop_reasons():
    scored = json.dumps([None, {"7": {"logprob": -0.5, "rank": 2, "decoded_token": "a"}}])
    chunks = [
        chunk("a", prompt_logprobs=[scored], stop_reason=["null"]),
        chunk("b", "stop", prompt_logprobs=["null"], stop_reason=['"END"']),
        chunk("", "stop", prompt_logprobs=["null"], stop_reason=["null"]),
    ]
    assert [c.stop_reason for c in chunks] == [None, "END", None]
    assert chunks[1].prompt_logprobs is None
    result = GenerateResult.from_chunks(chunks)
    assert result.prompt_logprobs == (None, {7: Logprob(-0.5, 2, "a")})
    assert result.stop_reason == "END"
    assert chunk("", "stop", stop_reason=["17"]).stop_reason == 17


def test_no_chunks_are_no_result():
    with pytest.raises(ValueError, match="no chunks"):
        GenerateResult.from_chunks([])
