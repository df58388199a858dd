"""Engine outputs become output tensors: deltas, several sequences, optional outputs."""

import json

import numpy as np
from charonia.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, RequestTimings
from charonia.triton.inputs import ResponseOptions
from charonia.triton.outputs import ResponseAssembler


def delta(*items: CompletionOutput, finished: bool = False, prompt: str | None = "Hi") -> RequestOutput:
    timings = RequestTimings(queue=0.1, first_token=0.2, total=0.3)
    return RequestOutput("r", prompt, [5, 6, 7], list(items), finished, num_cached_tokens=2, timings=timings)


def item(
    index: int, text: str, *ids: int, finish: FinishReason | None = None, total: float = 0.0
) -> CompletionOutput:
    logprobs = [{token: Logprob(-0.5, 1, text)} for token in ids]
    return CompletionOutput(index, text, list(ids), total, logprobs, finish)


def assembler(*outputs: str, n: int = 1, **options: object) -> ResponseAssembler:
    return ResponseAssembler(ResponseOptions(stream=True, outputs=frozenset(outputs), **options), n)


def texts(arrays: dict) -> list[str]:
    return [value.decode() for value in arrays["text_output"]]


def test_only_what_was_asked_for_is_there() -> None:
    plain = assembler()
    plain.add(delta(item(0, "a", 1)))
    assert set(plain.take()) == {"text_output"}


def test_deltas_that_gathered_leave_as_one() -> None:
    gathered = assembler(
        "num_output_tokens", "token_ids", "logprobs", "cumulative_logprob", wants_logprobs=True
    )
    gathered.add(delta(item(0, "a", 1, total=-0.5)))
    gathered.add(delta(item(0, "b", 2, 3, total=-1.5)))
    arrays = gathered.take()
    assert texts(arrays) == ["ab"]
    assert arrays["token_ids"].tolist() == [1, 2, 3]
    assert arrays["num_output_tokens"].tolist() == [3]
    assert arrays["cumulative_logprob"].tolist() == [-1.5]
    positions = json.loads(arrays["logprobs"][0])
    assert [list(position) for position in positions] == [["1"], ["2"], ["3"]]
    assert positions[0]["1"] == {"logprob": -0.5, "rank": 1, "decoded_token": "a"}
    assert not gathered.has_content
    gathered.add(delta(item(0, "c", 4, total=-2.0)))
    assert texts(gathered.take()) == ["c"]


def test_types_and_shapes() -> None:
    every = assembler(
        "finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "token_ids",
        "timings", "prompt_logprobs", "stop_reason", n=2,
    )  # fmt: skip
    every.add(delta(item(0, "a", 1, 2), item(1, "b", 3, finish=FinishReason.STOP)))
    arrays = every.take()
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "text_output": (np.object_, (2,)),
        "finish_reason": (np.object_, (2,)),
        "cumulative_logprob": (np.float32, (2,)),
        "logprobs": (np.object_, (2,)),
        "num_input_tokens": (np.uint32, (1,)),
        "num_output_tokens": (np.uint32, (2,)),
        "token_ids": (np.int32, (3,)),
        "timings": (np.object_, (1,)),
        "prompt_logprobs": (np.object_, (1,)),
        "stop_reason": (np.object_, (2,)),
    }
    assert arrays["finish_reason"].tolist() == [b"None", b"stop"]
    assert arrays["logprobs"].tolist() == [b"null", b"null"]
    assert arrays["num_input_tokens"].tolist() == [3]
    assert arrays["num_output_tokens"].tolist() == [2, 1]
    assert json.loads(arrays["timings"][0]) == {
        "queue_s": 0.1, "first_token_s": 0.2, "total_s": 0.3, "num_cached_tokens": 2,
    }  # fmt: skip


def test_sequences_without_news_keep_their_place_and_reason() -> None:
    two = assembler("finish_reason", "num_output_tokens", n=2)
    two.add(delta(item(1, "b", 3, finish=FinishReason.LENGTH)))
    assert texts(two.take()) == ["", "b"]
    assert two.finish_reasons == ("length",)
    two.add(delta(item(0, "a", 1, finish=FinishReason.STOP), finished=True))
    arrays = two.take()
    assert texts(arrays) == ["a", ""]
    assert arrays["finish_reason"].tolist() == [b"stop", b"length"]
    assert arrays["num_output_tokens"].tolist() == [1, 0]
    assert two.finished
    assert two.finish_reasons == ("stop", "length")


def test_tokens_without_text_are_no_content() -> None:
    held = assembler("token_ids")
    held.add(delta(item(0, "", 1)))
    assert not held.has_content
    held.add(delta(item(0, "é", 2)))
    assert held.has_content
    assert held.take()["token_ids"].tolist() == [1, 2]
    tokens_only = assembler(tokens_are_content=True)
    tokens_only.add(delta(item(0, "", 1)))
    assert tokens_only.has_content


def test_nul_never_reaches_a_client() -> None:
    only_nul = assembler()
    only_nul.add(delta(item(0, "\0", 1)))
    assert not only_nul.has_content
    only_nul.add(delta(item(0, "a\0b", 2)))
    assert texts(only_nul.take()) == ["ab"]


def test_echo_goes_to_every_sequence() -> None:
    whole = ResponseAssembler(ResponseOptions(echo=True), 2)
    whole.add(delta(item(0, " a", 1), item(1, " b", 2)))
    whole.add(delta(item(0, " c", 3), item(1, " d", 4), finished=True))
    assert texts(whole.take()) == ["Hi a c", "Hi b d"]


def test_logprobs_of_the_prompt_come_once() -> None:
    scored = assembler("prompt_logprobs")
    output = delta(item(0, "a", 1))
    output.prompt_logprobs = [None, {7: Logprob(-0.25, 2, "x"), 8: Logprob(float("-inf"), 1, "y")}]
    scored.add(output)
    assert json.loads(scored.take()["prompt_logprobs"][0]) == [
        None,
        {
            "7": {"logprob": -0.25, "rank": 2, "decoded_token": "x"},
            "8": {"logprob": -9999.0, "rank": 1, "decoded_token": "y"},
        },
    ]
    scored.add(output)
    assert scored.take()["prompt_logprobs"].tolist() == [b"null"]


def test_stop_reasons_are_json_and_stay() -> None:
    three = assembler("stop_reason", n=3)
    by_text, by_id = item(0, "a", 1, finish=FinishReason.STOP), item(2, "c", 9, finish=FinishReason.STOP)
    by_text.stop_reason, by_id.stop_reason = 'the "end"', 9
    three.add(delta(by_text, item(1, "b", 2)))
    assert [json.loads(value) for value in three.take()["stop_reason"]] == ['the "end"', None, None]
    three.add(delta(item(1, "b", 3, finish=FinishReason.LENGTH), by_id, finished=True))
    assert [json.loads(value) for value in three.take()["stop_reason"]] == ['the "end"', None, 9]


def test_infinite_logprobs_are_valid_json() -> None:
    certain = assembler("logprobs", wants_logprobs=True)
    certain.add(delta(CompletionOutput(0, "a", [1], 0.0, [{1: Logprob(float("-inf"), 1, "a")}])))
    assert json.loads(certain.take()["logprobs"][0])[0]["1"]["logprob"] == -9999.0
