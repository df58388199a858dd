"""The OpenAI API of `charonia serve`: the official client, the gateway, Triton and the engine with the real model."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pydantic
import pytest
import torch
from charonia.entrypoints.default_model import ensure_default_model
from support.launch import eventually, free_ports
from support.served import Served, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.server

ASK = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def port() -> int:
    return free_ports()[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("gateway")
    arguments = (
        "--dtype=float32",
        f"--gateway-port={port}",
        "--gateway-workers=1",
        "--served-model-name=snail",
    )
    with serving(folder, None, *arguments) as served:
        yield served


class Scores(NamedTuple):
    """Log-probabilities of all tokens but the first, and the most likely token in each's place."""

    own: list[float]
    best: list[int]


@pytest.fixture(scope="module")
def scored() -> dict[str, Any]:
    """Prompts as token ids, their texts, and their `Scores` by transformers in fp32."""
    folder = ensure_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["The capital of France is Paris.", "Käse, 日本語 🙂 und mehr", "1 2 3 4 5 6"]
    prompts = [tokenizer.encode(text) for text in texts]
    found = []
    for ids in prompts:
        with torch.inference_mode():
            values = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = values.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(Scores(own.tolist(), values.argmax(-1).tolist()))
    return {"texts": texts, "prompts": prompts, "logprobs": found}


@pytest.fixture
def url(served: Served, port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    options = {"model": "snail", "messages": ASK, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    text = whole.choices[0].message.content
    assert "Paris" in text
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 20


def test_completions_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="snail",
        prompt=["The capital of France is", "One two three"],
        max_tokens=3,
        temperature=0,
        logprobs=2,
    )
    first = answer.choices[0]
    assert "Paris" in first.text
    assert "".join(first.logprobs.tokens) == first.text
    assert all(len(top) >= 2 for top in first.logprobs.top_logprobs)
    assert len(answer.choices) == 2


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_as_evaluation_harnesses_ask_for_them(
    url: str, scored: dict[str, Any], max_tokens: int
) -> None:
    """The request of lm-evaluation-harness (`local-completions`), and how it reads the answer."""
    body = {"model": "snail", "prompt": list(scored["prompts"]), "temperature": 0, "max_tokens": max_tokens,
            "logprobs": 1, "seed": 1234, "echo": True}  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == max_tokens * len(scored["prompts"])
    for choice, ids, expected in zip(answer["choices"], scored["prompts"], scored["logprobs"], strict=True):
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(ids) + max_tokens}
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected.own, abs=1e-3)
        for place, best in enumerate(expected.best, 1):
            greedy = found["token_logprobs"][place] == max(found["top_logprobs"][place].values())
            assert greedy == (best == ids[place])
        shown = [
            choice["text"][start:].startswith(token)
            for token, start in zip(found["tokens"], found["text_offset"], strict=True)
            if "\ufffd" not in token
        ]
        assert all(shown) and found["text_offset"] == sorted(found["text_offset"])
        assert choice["text"][: len(scored["texts"][choice["index"]])] == scored["texts"][choice["index"]]


def test_stop_reasons_and_prompt_logprobs(client: openai.OpenAI) -> None:
    options = {"model": "snail", "temperature": 0, "max_tokens": 12, "prompt": "The capital of France is"}
    stopped = client.completions.create(**options, stop=["Paris"], extra_body={"prompt_logprobs": 1}).choices[
        0
    ]
    assert stopped.model_extra["stop_reason"] == "Paris"
    first, *others = stopped.model_extra["prompt_logprobs"]
    assert first is None and len(others) == 4
    assert all(sum(entry["rank"] == 1 for entry in position.values()) == 1 for position in others)
    (*_, last) = client.chat.completions.create(
        model="snail", messages=ASK, temperature=0, stream=True, extra_body={"stop_token_ids": [7042]}
    )
    assert last.choices[0].model_extra["stop_reason"] == 7042


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=99)


def test_a_schema_holds(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="snail",
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        max_tokens=80,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_that_must_be_called(client: openai.OpenAI, choice) -> None:
    answer = client.chat.completions.create(
        model="snail",
        messages=ASK,
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=80,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")


def test_tokens_and_embeddings(url: str, client: openai.OpenAI) -> None:
    body = {"messages": ASK, "return_token_strs": True}
    chat = httpx.post(f"{url}/tokenize", json=body).json()
    assert chat["count"] == len(chat["tokens"]) == len(chat["token_strs"]) > 20
    assert chat["max_model_len"] == 8192
    text = httpx.post(f"{url}/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert "What is the capital of France?" in text
    assert httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"] == chat["tokens"]
    (item,) = client.embeddings.create(model="snail", input="sea snail").data
    assert sum(value * value for value in item.embedding) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": ASK, "temperature": -1}, "temperature"),
        ({"messages": ASK, "stop": [""]}, "stop"),
        ({"messages": ASK, "structured_outputs": {"regex": "("}}, None),
        ({"messages": [{"role": "user"}]}, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            None,
        ),
        ({"messages": ASK, "chat_template_kwargs": {"chat_template": "x"}}, None),
    ],
)
def test_what_the_model_refuses_is_a_400(url: str, body, param) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 4}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param


def test_a_client_that_leaves_frees_the_engine(served: Served, url: str) -> None:
    body = {"messages": ASK, "max_tokens": 4000, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=1.0)
    served.wait_idle()
    cancelled = [value for name, value in served.metrics().items() if 'outcome="cancelled"' in name]
    assert cancelled == [2]


def test_a_dead_gateway_comes_back(served: Served, url: str) -> None:
    first = served.gateway_pid
    os.kill(first, signal.SIGKILL)
    assert served.says("the OpenAI gateway was ended by SIGKILL; restarting it in 1 s")

    def is_healthy() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    assert eventually(is_healthy, 60)
    assert served.gateway_pid != first
    assert f"OpenAI API {url}/v1" in served.everything()
    assert Path(f"/proc/{served.server_pid}").exists()


def test_a_dead_engine_is_told_within_the_stream_and_before_it(served: Served, url: str) -> None:
    body = {"messages": ASK, "max_tokens": 4000, "ignore_eos": True}
    completions = f"{url}/v1/chat/completions"
    with httpx.stream("POST", completions, json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        os.kill(served.engine_pid, signal.SIGKILL)
        last = [line for line in lines if line != "data: [DONE]"][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == 503 and "engine was lost" in error["message"]

    refused = httpx.post(completions, json=body, timeout=60)
    assert refused.status_code == 503, refused.text
    assert int(refused.headers["retry-after"]) >= 1
    assert "not ready" in refused.json()["error"]["message"]

    def is_served() -> bool:
        return httpx.post(completions, json={**body, "max_tokens": 1}, timeout=60).status_code == 200

    assert eventually(is_served, 60)
