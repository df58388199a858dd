"""Chat completions through the official client."""

import json

import httpx
import openai
import pytest
from support.fake_triton import ModelError

HELLO = [{"role": "user", "content": "one two three"}]


def joined(chunks, member="content"):
    return "".join(getattr(chunk.choices[0].delta, member) or "" for chunk in chunks if chunk.choices)


def test_a_whole_answer(client, fake):
    answer = client.chat.completions.create(model="llm", messages=HELLO, temperature=0.5, seed=7, stop=["x"])
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "one two three",
        "stop",
    )
    assert (answer.object, answer.model) == ("chat.completion", "llm")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        7,
        3,
        10,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert fake.last.chat == {
        "messages": HELLO,
        "add_generation_prompt": True,
        "continue_final_message": False,
    }
    assert fake.last.sampling == {"temperature": 0.5, "seed": 7, "stop": ["x"], "max_tokens": 2**31 - 1}
    assert fake.last.inputs["stream"] is False
    assert fake.last.inputs["exclude_input_in_output"] is True


def test_a_stream_with_usage(client, fake):
    stream = client.chat.completions.create(
        model="llm", messages=HELLO, stream=True, max_tokens=2, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks) == "one two"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, "length"]
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_asks_the_model_for_no_more_than_it_tells(client, fake):
    list(client.chat.completions.create(model="llm", messages=HELLO, stream=True))
    assert [name for name in fake.last.inputs if name.startswith("return_")] == ["return_finish_reason"]


def test_usage_in_every_chunk(client, fake):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(model="llm", messages=HELLO, stream=True, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in stream] == [1, 1, 2, 3, 3]


async def test_the_async_client(gateway_url, fake):
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="llm", messages=HELLO, stream=True)
        assert joined([chunk async for chunk in stream]) == "one two three"
        answer = await client.chat.completions.create(model="llm", messages=HELLO)
        assert answer.choices[0].message.content == "one two three"


def test_several_choices(client, fake):
    answer = client.chat.completions.create(model="llm", messages=HELLO, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, "one two three") for i in range(3)]
    assert answer.usage.completion_tokens == 9
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="llm", messages=HELLO, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["one two three"] * 3


def test_logprobs(client, fake):
    answer = client.chat.completions.create(model="llm", messages=HELLO, logprobs=True, top_logprobs=2)
    first, *_ = content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["one", " two", " three"]
    assert (first.logprob, first.bytes) == (-0.5, list(b"one"))
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("one", -0.5), ("other", -1.5)]
    assert fake.last.sampling["logprobs"] == 2
    chunks = client.chat.completions.create(model="llm", messages=HELLO, logprobs=True, stream=True)
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == ["one", " two", " three"]
    assert streamed[0].top_logprobs == []


def test_fields_of_vllm_reach_the_model(client, fake):
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2,
        "stop_token_ids": [3], "include_stop_str_in_output": True, "skip_special_tokens": False, "priority": -1,
        "cache_salt": "s", "bad_words": ["b"], "allowed_token_ids": [1, 2],
    }  # fmt: skip
    ignored = {"unknown_field": 1, "use_beam_search": False, "documents": None, "functions": []}
    client.chat.completions.create(
        model="llm", messages=HELLO, logit_bias={"5": 1.5}, max_completion_tokens=9,
        extra_body={**extra, **ignored, "chat_template_kwargs": {"a": 1}},
    )  # fmt: skip
    assert fake.last.sampling == {**extra, "logit_bias": {"5": 1.5}, "max_tokens": 9}
    assert fake.last.chat["chat_template_kwargs"] == {"a": 1}


def test_developers_and_parts(client, fake):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a b"}]},
    ]
    answer = client.chat.completions.create(model="llm", messages=messages)
    assert answer.choices[0].message.content == "a b"
    assert fake.last.chat["messages"] == [{"role": "system", "content": "be brief"}, messages[1]]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_reaches_the_template(client, fake, name):
    turn = {"role": "assistant", "content": "Yes.", name: "hm"}
    client.chat.completions.create(model="llm", messages=[*HELLO, turn, *HELLO])
    assert fake.last.chat["messages"][1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "hm",
    }


@pytest.mark.parametrize(
    ("wanted", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}},
                }
            },
            {"json": {"type": "object"}},
        ),
        ({"extra_body": {"guided_choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"extra_body": {"guided_regex": "a+"}}, {"regex": "a+"}),
        ({"extra_body": {"structured_outputs": {"grammar": "g"}}}, {"grammar": "g"}),
    ],
)
def test_structured_outputs(client, fake, wanted, constraint):
    client.chat.completions.create(model="llm", messages=HELLO, **wanted)
    assert fake.last.sampling["structured_outputs"] == constraint


def test_token_ids(client, fake):
    answer = client.chat.completions.create(
        model="llm", messages=HELLO, extra_body={"return_token_ids": True}
    )
    assert answer.prompt_token_ids == [0, 1, 2]
    assert answer.choices[0].token_ids == [sum(word.encode()) for word in ("one", " two", " three")]
    chunks = list(
        client.chat.completions.create(
            model="llm", messages=HELLO, stream=True, extra_body={"return_token_ids": True}
        )
    )
    assert chunks[0].choices[0].model_extra["prompt_token_ids"] == [0, 1, 2]
    ids = [i for c in chunks for i in (c.choices[0].model_extra or {}).get("token_ids", [])]
    assert ids == answer.choices[0].token_ids


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_model_have_their_status(client, fake, stream):
    def refuse(request):
        raise ModelError("sampling parameter 'top_p' must be in (0, 1], got 2.0")
        yield

    fake.script = refuse
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="llm", messages=HELLO, stream=stream)
    assert caught.value.body["message"] == "sampling parameter 'top_p' must be in (0, 1], got 2.0"
    assert caught.value.body["type"] == "invalid_request_error"


def test_a_full_queue_and_a_dead_engine_ask_to_come_again(client, fake):
    def fail(text):
        def script(request):
            raise ModelError(text)
            yield

        return script

    fake.script = fail("128 requests are waiting already; try again later")
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="llm", messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "1"
    fake.script = fail("the model is not ready: the engine is starting")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="llm", messages=HELLO)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "2")


def test_an_error_within_a_stream_is_its_last_event(client, fake):
    def script(request):
        yield "one"
        yield " two"
        raise ModelError("internal error; the server's log has the details")

    fake.script = script
    stream = client.chat.completions.create(model="llm", messages=HELLO, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "one"]
    with pytest.raises(openai.APIError, match="internal error"):
        next(stream)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "n": 1000}, "n"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "tool_choice": "required"}, "tools"),
        ({"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": HELLO, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": HELLO, "extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"messages": HELLO, "extra_body": {"chat_template": "{{ messages }}"}}, "chat_template"),
    ],
)
def test_wrong_fields_are_named(client, fake, wrong, field):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="llm", **wrong)
    assert caught.value.body["param"] == field
    assert field in caught.value.body["message"]


def test_an_unknown_model(client, fake):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.body["code"] == "model_not_found"


def test_nan_is_no_json(gateway_url, fake):
    body = json.dumps({"messages": [{"role": "user", "content": "a", "x": float("nan")}]})
    answer = httpx.post(
        f"{gateway_url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
