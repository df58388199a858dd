"""Completions, embeddings, tokens and models through the official client."""

import httpx
import openai
import pytest


def test_a_text(client, fake):
    answer = client.completions.create(model="llm", prompt="a b c")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.object) == ("a b c", "stop", "text_completion")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 3)
    assert fake.last.inputs["text_input"] == "a b c"
    assert fake.last.sampling == {"max_tokens": 16}


def test_token_ids(client, fake):
    assert client.completions.create(model="llm", prompt=[5, 6]).choices[0].text == "<5> <6>"
    assert fake.last.inputs["input_ids"] == [5, 6]


def test_lists_of_prompts(client, fake):
    answer = client.completions.create(model="llm", prompt=["a", "b c"], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "a"), (1, "a"), (2, "b c"), (3, "b c")]
    assert answer.usage.prompt_tokens == 14
    assert answer.usage.completion_tokens == 6
    answer = client.completions.create(model="llm", prompt=[[1], [2, 3]])
    assert [c.text for c in answer.choices] == ["<1>", "<2> <3>"]
    assert {r.id[-2:] for r in fake.requests} == {"-0", "-1"}


def test_a_stream_of_several_prompts(client, fake):
    texts = {}
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(model="llm", prompt=["a b", "c d e"], stream=True, stream_options=options)
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "a b", 1: "c d e"}
    assert chunks[-1].usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "echoed"), [("a b", "a ba b"), ([1, 2], "<1> <2><1> <2>")])
def test_echo(client, fake, stream, prompt, echoed):
    answer = client.completions.create(model="llm", prompt=prompt, echo=True, stream=stream)
    if stream:
        assert "".join(chunk.choices[0].text for chunk in answer) == echoed
    else:
        assert answer.choices[0].text == echoed


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, fake, stream):
    answer = client.completions.create(model="llm", prompt="a bc d", logprobs=1, stream=stream)
    pieces = [c.choices[0].logprobs for c in answer] if stream else [answer.choices[0].logprobs]
    assert [t for p in pieces for t in p.tokens] == ["a", " bc", " d"]
    assert [o for p in pieces for o in p.text_offset] == [0, 1, 4]
    assert [v for p in pieces for v in p.token_logprobs] == [-0.5] * 3
    assert pieces[0].top_logprobs[0] == {"a": -0.5, "other": -1.5}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 50}, "logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["a"] * 64, "n": 100}, "n"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ],
)
def test_wrong_fields_are_named(client, fake, wrong, field):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="llm", **wrong)
    assert caught.value.body["param"].split(".")[0] == field


def test_one_failing_prompt_fails_the_answer(client, fake):
    from support.fake_triton import ModelError, echo

    def script(request):
        if request.inputs["text_input"] == "bad":
            raise ModelError("the prompt has 9000 tokens")
        request.wait(5)
        yield from echo(request)

    fake.script = script
    with pytest.raises(openai.BadRequestError, match="9000"):
        client.completions.create(model="llm", prompt=["good", "bad"])


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_take_turns(client, fake, stream, monkeypatch):
    monkeypatch.setattr("charonia_client.gateway.completion.MAX_CONCURRENT", 3)
    monkeypatch.setattr("charonia_client.gateway.merge.MAX_CONCURRENT", 3)
    live: set[str] = set()
    most = 0

    def script(request):
        nonlocal most
        live.add(request.id)
        most = max(most, len(live))
        request.wait(0.02)
        yield request.inputs["text_input"]
        live.discard(request.id)

    fake.script = script
    prompts = [f"p{i}" for i in range(12)]
    answer = client.completions.create(model="llm", prompt=prompts, stream=stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    assert {c.index: c.text for c in choices} == dict(enumerate(prompts))
    assert 1 < most <= 3


@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_embeddings(client, fake, encoding):
    answer = client.embeddings.create(
        model="llm", input=["a b c", "d"], encoding_format=encoding, dimensions=3
    )
    vectors = [item.embedding for item in answer.data]
    if encoding == "base64":
        assert vectors == ["AABAQAAAAD8AAAA/", "AACAPwAAAD8AAAA/"]
    else:
        assert vectors == [[3.0, 0.5, 0.5], [1.0, 0.5, 0.5]]
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == 4


def test_embeddings_of_token_ids(client, fake):
    answer = client.embeddings.create(model="llm", input=[1, 2, 3], encoding_format="float")
    assert answer.data[0].embedding == [3.0, 0.5, 0.5, 0.5]


def test_models(client, fake):
    (card,) = client.models.list().data
    assert (card.id, card.owned_by, card.model_extra["max_model_len"]) == ("llm", "charonia", 2048)
    assert client.models.retrieve("llm").id == "llm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_tokens(gateway_url, fake):
    with httpx.Client(base_url=gateway_url) as http:
        answer = http.post(
            "/tokenize", json={"model": "llm", "prompt": "a b", "return_token_strs": True}
        ).json()
        assert answer == {"count": 2, "max_model_len": 2048, "tokens": [0, 1], "token_strs": ["a", "b"]}
        chat = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
        assert http.post("/tokenize", json=chat).json()["token_strs"] is None
        assert fake.utilities[-1]["tokenize"]["add_generation_prompt"] is False
        assert http.post("/detokenize", json={"tokens": [4, 5]}).json() == {"prompt": "<4> <5>"}
        assert http.post("/tokenize", json={}).status_code == 400
