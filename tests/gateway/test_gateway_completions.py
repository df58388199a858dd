"""Completions, embeddings, tokens and models through the official client."""

import time

import httpx
import openai
import pytest
from charonia_client.gateway.logprobs import CompletionLogprobs
from hypothesis import given, settings
from hypothesis import strategies as st


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
    answer = client.completions.create(model="llm", prompt="a bc d", logprobs=2, stream=stream)
    pieces = [c.choices[0].logprobs for c in answer] if stream else [answer.choices[0].logprobs]
    assert [t for p in pieces for t in p.tokens] == ["a", " bc", " d"]
    assert [o for p in pieces for o in p.text_offset] == [0, 1, 4]
    assert [v for p in pieces for v in p.token_logprobs] == [-0.5] * 3
    assert pieces[0].top_logprobs[0] == {"a": -0.5, "other": -1.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "words"), [("a bc d", ["a", " bc", " d"]), ([5, 6, 7], ["<5>", " <6>", " <7>"])]
)
def test_echo_with_logprobs(client, fake, stream, prompt, words):
    answer = client.completions.create(
        model="llm", prompt=prompt, echo=True, logprobs=2, max_tokens=2, stream=stream
    )
    choices = [c.choices[0] for c in answer] if stream else answer.choices
    pieces = [choice.logprobs for choice in choices]
    texts = [*words, *words[:2]]
    assert "".join(choice.text for choice in choices) == "".join(texts)
    assert [t for p in pieces for t in p.tokens] == texts
    assert [v for p in pieces for v in p.token_logprobs] == [None, *[-0.5] * 4]
    offsets = [sum(map(len, texts[:i])) for i in range(5)]
    assert [o for p in pieces for o in p.text_offset] == offsets
    tops = [t for p in pieces for t in p.top_logprobs]
    assert tops == [None, *({text: -0.5, "other": -1.5} for text in texts[1:])]
    assert fake.last.sampling == {"max_tokens": 2, "logprobs": 2, "prompt_logprobs": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_prompt(client, fake, stream):
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.completions.create(
        model="llm", prompt=["a b", "c d e"], echo=True, logprobs=1, max_tokens=0, n=2, **options
    )
    parts = list(answer) if stream else [answer]
    choices = sorted((c for part in parts for c in part.choices), key=lambda c: c.index)
    assert [c.text for c in choices] == ["a b", "a b", "c d e", "c d e"]
    assert [c.logprobs.tokens for c in choices][1:3] == [["a", " b"], ["c", " d", " e"]]
    assert {c.finish_reason for c in choices} == {"length"}
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens) == (14, 0)
    assert fake.last.sampling == {"max_tokens": 1, "n": 2, "prompt_logprobs": 1}


def test_prompt_logprobs_as_vllm_tells_them(client, fake):
    ask = {"model": "llm", "prompt": "a b", "max_tokens": 1}
    (choice,) = client.completions.create(**ask, extra_body={"prompt_logprobs": 2}).choices
    first, second = choice.model_extra["prompt_logprobs"]
    assert first is None and choice.text == "a" and choice.logprobs is None
    assert [entry["rank"] for entry in second.values()] == [1, 2]
    assert second["130"] == {"logprob": -0.5, "rank": 1, "decoded_token": " b"}
    (both,) = client.completions.create(
        **ask, echo=True, logprobs=1, extra_body={"prompt_logprobs": 3}
    ).choices
    assert len(both.model_extra["prompt_logprobs"][1]) == 3
    assert both.logprobs.top_logprobs[1:] == [{" b": -0.5}, {"a": -0.5}]
    assert fake.last.sampling["prompt_logprobs"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reason(client, fake, stream):
    def reasons(**options):
        answer = client.completions.create(model="llm", prompt="a b", stream=stream, **options)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        return [c.model_extra["stop_reason"] for c in choices if c.finish_reason]

    assert reasons(stop=["END"]) == ["END"]
    assert fake.last.inputs["return_stop_reason"] is True
    assert reasons(stop=["END"], max_tokens=1) == [None]
    assert reasons() == [None]
    assert "return_stop_reason" not in fake.last.inputs


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("a b", ["a", " b"], [0, 1]),
        ("Hi", ["<s>", "Hi"], [0, 0]),
        ("né en", ["n", "\ufffd", "\ufffd", " en"], [0, 1, 1, 2]),
        ("x\ufffdy", ["x", "\ufffd", "y"], [0, 1, 2]),
        ("ab", ["ab", "END"], [0, 2]),
        ("ab", ["", "ab", ""], [0, 0, 2]),
    ],
)
def test_offsets_are_places_in_the_text(text, tokens, offsets):
    positions = [{str(i): {"logprob": -1.0, "rank": 1, "decoded_token": t}} for i, t in enumerate(tokens)]
    assert CompletionLogprobs(1).piece(text, positions)["text_offset"] == offsets


def test_offsets_where_text_comes_after_its_tokens():
    """The end of a token's text may be held back, as the beginning of a stop string."""
    pieces = CompletionLogprobs(1)
    found = []
    for text, token in (("a x", "a xEN"), ("ENfoo", "foo"), (" b", " b")):
        position = {"1": {"logprob": -1.0, "rank": 1, "decoded_token": token}}
        found += pieces.piece(text, [position])["text_offset"]
    assert found == [0, 5, 8]


def test_offsets_of_many_tokens_take_linear_time():
    """Of a long answer at once, and of tokens that are never shown."""
    positions = [{"1": {"logprob": -1.0, "rank": 1, "decoded_token": token}} for token in ("<s>", "word ")]
    before = time.process_time()
    whole = CompletionLogprobs(1).piece("word " * 100_000, positions[1:] * 100_000)["text_offset"]
    hidden = CompletionLogprobs(1)
    for _ in range(100_000):
        hidden.piece("", positions[:1])
    assert time.process_time() - before < 15
    assert whole == list(range(0, 500_000, 5))


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", " a", "ab", "EN", "D", "\n", "\n\n", " the", "é", " END"]),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_offsets_are_right_however_late_the_text_comes(pieces):
    """Each token comes with its number of characters held back."""
    logprobs = CompletionLogprobs(1)
    text, sent, found, starts = "", 0, [], []
    for token, held in pieces:
        starts.append(len(text))
        text += token
        end = max(sent, len(text) - held)
        position = {"1": {"logprob": -1.0, "rank": 1, "decoded_token": token}}
        found += logprobs.piece(text[sent:end], [position])["text_offset"]
        sent = end
    assert found == starts


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 50}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"prompt": "a", "extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs"),
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
