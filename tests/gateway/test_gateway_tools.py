"""Tool calls, reasoning and parsed answers through the official client."""

import json
import pickle
from collections.abc import Iterator

import openai
import pydantic
import pytest
from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.output_formats import reasoning_parser_for, tool_parser_for
from charonia_client.gateway.protocol import ChatTool
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.tool_schema import named_tool_schema, required_tools_schema
from charonia_client.gateway.triton_model import TritonModel
from llguidance import LLMatcher, LLTokenizer
from support.gateway import running_gateway

ASK = [{"role": "user", "content": "weather in Oslo"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'

BYTES = LLTokenizer("byte")


def says(text, size=3):
    """A script that generates a text in small pieces."""

    def script(request) -> Iterator[str]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    return script


def streamed(chunks):
    """Content, reasoning, calls as [name, arguments], finish reason."""
    content, reasoning, calls, reason = "", "", {}, None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        extra = choice.delta.model_extra or {}
        assert extra.get("reasoning") == extra.get("reasoning_content")
        reasoning += extra.get("reasoning") or ""
        for call in choice.delta.tool_calls or ():
            known = calls.setdefault(call.index, ["", ""])
            if call.id is not None:
                assert call.type == "function"
                known[0] = call.function.name
            known[1] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, reasoning, [(name, json.loads(arguments)) for name, arguments in calls.values()], reason


@pytest.fixture(scope="module")
def thinking_url(scripted) -> Iterator[str]:
    """A gateway that chooses its parsers by the model's chat template."""
    with running_gateway(GatewaySettings(triton=scripted.url)) as url:
        yield url


@pytest.fixture
def thinking(thinking_url, fake) -> Iterator[openai.OpenAI]:
    fake.chat_template = "{# <tool_call> </think> #}"
    with openai.OpenAI(base_url=f"{thinking_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_auto(client, fake):
    fake.script = says(f"Let me look.{CALL}\n{CALL}")
    answer = client.chat.completions.create(
        model="llm", messages=ASK, tools=[WEATHER], tool_choice="auto", max_tokens=999
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
        {"city": "Oslo"}
    ] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert fake.last.chat["tools"] == [WEATHER]
    assert "structured_outputs" not in fake.last.sampling


def test_auto_streams(client, fake):
    fake.script = says(f"Let me look.{CALL}")
    chunks = client.chat.completions.create(
        model="llm", messages=ASK, tools=[WEATHER], stream=True, max_tokens=999
    )
    assert streamed(chunks) == ("Let me look.", "", [("get_weather", {"city": "Oslo"})], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_no_parallel_calls(client, fake, stream):
    fake.script = says(f"{CALL}\n{CALL}")
    answer = client.chat.completions.create(
        model="llm", messages=ASK, tools=[WEATHER], parallel_tool_calls=False, stream=stream, max_tokens=999
    )
    if stream:
        content, _, calls, reason = streamed(answer)
    else:
        (choice,) = answer.choices
        content, calls, reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
    assert (content or "", len(calls), reason) == ("", 1, "tool_calls")


def test_no_tools_no_calls(client, fake):
    fake.script = says(CALL)
    answer = client.chat.completions.create(
        model="llm", messages=ASK, tools=[WEATHER], tool_choice="none", max_tokens=999
    )
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None
    assert "tools" not in fake.last.chat


@pytest.mark.parametrize("stream", [False, True])
def test_required(client, fake, stream):
    calls = [{"name": "get_weather", "parameters": {"city": "Oslo"}}, {"name": "get_time", "parameters": {}}]
    fake.script = says(json.dumps(calls))
    answer = client.chat.completions.create(
        model="llm",
        messages=ASK,
        tools=[WEATHER, TIME],
        tool_choice="required",
        stream=stream,
        max_tokens=999,
    )
    if stream:
        got = streamed(answer)
    else:
        (choice,) = answer.choices
        found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
        got = (choice.message.content or "", "", found, choice.finish_reason)
    assert got == ("", "", [("get_weather", {"city": "Oslo"}), ("get_time", {})], "tool_calls")
    schema = fake.last.sampling["structured_outputs"]["json"]
    assert schema["type"] == "array"
    assert [s["properties"]["name"]["const"] for s in schema["items"]["anyOf"]] == ["get_weather", "get_time"]


@pytest.mark.parametrize("stream", [False, True])
def test_named(client, fake, stream):
    fake.script = says('{"city": "Oslo"}')
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model="llm", messages=ASK, tools=[WEATHER, TIME], tool_choice=choice, stream=stream, max_tokens=999
    )
    if stream:
        got = streamed(answer)[2:]
    else:
        (first,) = answer.choices
        found = [(c.function.name, json.loads(c.function.arguments)) for c in first.message.tool_calls]
        got = (found, first.finish_reason)
    assert got == ([("get_weather", {"city": "Oslo"})], "stop")
    assert fake.last.sampling["structured_outputs"] == {"json": WEATHER["function"]["parameters"]}


def test_a_cut_off_call_ends_with_length(client, fake):
    fake.script = says('[{"name": "get_weather", "parameters": {"ci')
    answer = client.chat.completions.create(
        model="llm", messages=ASK, tools=[WEATHER], tool_choice="required", max_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"


def test_one_call_only(client, fake):
    fake.script = says('[{"name": "get_time", "parameters": {}}]')
    client.chat.completions.create(
        model="llm",
        messages=ASK,
        tools=[TIME],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=999,
    )
    assert fake.last.sampling["structured_outputs"]["json"]["maxItems"] == 1


def test_a_function_that_is_not_there(client, fake):
    choice = {"type": "function", "function": {"name": "launch"}}
    with pytest.raises(openai.BadRequestError, match="launch"):
        client.chat.completions.create(model="llm", messages=ASK, tools=[WEATHER], tool_choice=choice)


def accepts(schema, value) -> bool:
    """Whether the engine's grammar for a schema takes a value."""
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(schema))
    assert not matcher.is_error(), matcher.get_error()
    text = json.dumps(value).encode()
    return bool(matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting())


def chat_tool(name, parameters) -> ChatTool:
    function = {"name": name, "parameters": parameters}
    return ChatTool.model_validate({"type": "function", "function": function})


NODE = {
    "type": "object",
    "properties": {
        "value": {"$ref": "#/properties/size"},
        "size": {"type": "integer"},
        "next": {"$ref": "#"},
    },
    "additionalProperties": False,
}


def of_type(kind):
    return {
        "$id": f"https://tools.example/{kind}", "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}},
        "additionalProperties": False, "$defs": {"A": {"type": kind}, "B": {"items": {"$ref": "#/$defs/A"}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "legal"),
    [
        ("f", {"a": "x"}, True),
        ("f", {"a": 1}, False),
        ("g", {"a": 1}, True),
        ("g", {"a": "x"}, False),
        ("node", {"value": 1, "next": {"size": 2, "next": {}}}, True),
        ("node", {"value": "x"}, False),
        ("node", {"next": {"next": 3}}, False),
        ("untyped", {"b": True}, True),
        ("untyped", "b", False),
        ("bare", {}, True),
        ("bare", 5, False),
        ("other", {}, False),
    ],
)
def test_required_calls_follow_the_schema_of_their_tool(name, arguments, legal):
    tools = [
        chat_tool("f", of_type("string")), chat_tool("g", of_type("integer")), chat_tool("node", NODE),
        chat_tool("untyped", {"properties": {"b": {"type": "boolean"}}}), chat_tool("bare", None),
    ]  # fmt: skip
    call = {"name": name, "parameters": arguments}
    schema = required_tools_schema(tools, parallel=True)
    assert accepts(schema, [call]) == accepts(schema, [call, call]) == legal
    single = required_tools_schema(tools, parallel=False)
    assert (accepts(single, [call]), accepts(single, [call, call])) == (legal, False)
    if name != "other":
        assert accepts(named_tool_schema(tools, name), arguments) == legal


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart(thinking, fake, stream):
    fake.script = says("<think>\nhm, so\n</think>\n\nAn answer.")
    answer = thinking.chat.completions.create(model="llm", messages=ASK, stream=stream, max_tokens=999)
    if stream:
        content, reasoning, _, reason = streamed(answer)
    else:
        (choice,) = answer.choices
        content, reason = choice.message.content, choice.finish_reason
        reasoning = choice.message.reasoning_content
        assert choice.message.reasoning == reasoning
    assert (content.strip(), reasoning.strip(), reason) == ("An answer.", "hm, so", "stop")


def test_reasoning_that_the_prompt_opens(thinking, fake):
    fake.prompt_end = "<|im_start|>assistant\n<think>\n"
    fake.script = says("hm</think>Yes.")
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = thinking.chat.completions.create(model="llm", messages=ASK, extra_body=kwargs, max_tokens=999)
    assert (answer.choices[0].message.content, answer.choices[0].message.reasoning_content) == ("Yes.", "hm")
    assert fake.utilities[-1]["tokenize"]["chat_template_kwargs"] == {"enable_thinking": True}


async def test_how_a_prompt_ends_is_asked_once_for_each_setting_and_kept_small(scripted, fake):
    model = TritonModel(scripted.url, "llm")
    context = RequestContext("r")
    for length in (10, 1_000_000, 10, 1_000_000):
        assert (await model.prompt_end({"a": "x" * length}, context)).endswith(fake.prompt_end)
    await model.aclose()
    assert len(fake.utilities) == 2
    assert len(pickle.dumps(model._prompt_ends)) < 1000


def test_a_grammar_leaves_no_room_for_reasoning(thinking, fake):
    fake.prompt_end = "<think>"
    fake.script = says('{"a": 1}')
    answer = thinking.chat.completions.create(
        model="llm", messages=ASK, response_format={"type": "json_object"}, max_tokens=999
    )
    assert answer.choices[0].message.content == '{"a": 1}'


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (None, "hermes", None),
        ("{{ '[TOOL_CALLS]' }}", "mistral", None),
        ("<tool_call><function=x>", "qwen3_coder", None),
        ("<tool_call> </think>", "hermes", "qwen3"),
        ("<|python_tag|>", "llama3_json", None),
        (
            'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.',
            "llama3_json",
            None,
        ),
    ],
)
def test_parsers_by_template(template, tools, reasoning):
    assert (tool_parser_for(template), reasoning_parser_for(template)) == (tools, reasoning)


class Step(pydantic.BaseModel):
    explanation: str
    output: str


class Solution(pydantic.BaseModel):
    steps: list[Step]
    final: int


SOLUTION = {"steps": [{"explanation": "add", "output": "2"}], "final": 2}


def test_parse(client, fake):
    fake.script = says(json.dumps(SOLUTION))
    answer = client.chat.completions.parse(
        model="llm", messages=ASK, response_format=Solution, max_tokens=999
    )
    assert answer.choices[0].message.parsed == Solution.model_validate(SOLUTION)
    schema = fake.last.sampling["structured_outputs"]["json"]
    assert schema["required"] == ["steps", "final"]
    assert "Step" in schema["$defs"]


def test_parse_while_streaming(client, fake):
    fake.script = says(json.dumps(SOLUTION))
    with client.chat.completions.stream(
        model="llm", messages=ASK, response_format=Solution, max_tokens=999
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert answer.choices[0].message.parsed == Solution.model_validate(SOLUTION)


class GetWeather(pydantic.BaseModel):
    city: str


def test_parse_tool_calls(client, fake):
    fake.script = says(CALL)
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    with client.chat.completions.stream(model="llm", messages=ASK, tools=[tool], max_tokens=999) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Oslo")
    assert "tool_calls.function.arguments.done" in kinds
