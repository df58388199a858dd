"""Triton tensors and request parameters become engine requests, or errors that name what is wrong."""

import json

import msgspec
import numpy as np
import pytest
from charonia.errors import CharoniaError, ErrorCode, InvalidRequestError, UnsupportedError
from charonia.sampling_params import SamplingParams
from charonia.serving.request import ChatInput
from charonia.triton.contract import MAX_JSON_BYTES, MAX_PROMPT_BYTES
from charonia.triton.inputs import ParsedRequest, RawRequest, parse_request
from support.fake_pb import Request, flag, text


def parse(
    inputs: dict, parameters: object = None, *, timeout: int = 0, ignored: tuple[str, ...] = ()
) -> ParsedRequest:
    encoded = parameters if isinstance(parameters, str) else json.dumps(parameters or {})
    return parse_request(RawRequest.take(Request(inputs, encoded, "r1", timeout)), ignored)


def params_of(sampling: object, parameters: object = None) -> SamplingParams:
    inputs = {"text_input": text("hi"), "sampling_parameters": text(json.dumps(sampling))}
    return parse(inputs, parameters).generation.params


def refused(inputs: dict, parameters: object = None) -> CharoniaError:
    with pytest.raises(CharoniaError) as caught:
        parse(inputs, parameters)
    return caught.value


def test_defaults() -> None:
    parsed = parse({"text_input": text("héllo")})
    assert parsed.generation.prompt == "héllo"
    assert parsed.generation.params == SamplingParams(max_tokens=16)
    assert parsed.generation.request_id == "r1"
    assert (parsed.generation.priority, parsed.generation.timeout_s) == (0, None)
    assert parsed.options.echo
    assert not parsed.options.stream
    assert parsed.options.outputs == frozenset()


def test_values_are_cast_as_clients_send_them() -> None:
    params = params_of(
        {
            "temperature": "0.1",
            "max_tokens": "100",
            "ignore_eos": "false",
            "top_p": "0.5",
            "seed": None,
            "n": 2,
        }
    )
    assert params == SamplingParams(temperature=0.1, max_tokens=100, ignore_eos=False, top_p=0.5, n=2)
    assert params_of({"temperature": 1}).temperature == 1.0


def test_request_parameters_carry_sampling_parameters_too() -> None:
    params = parse(
        {"text_input": text("hi")}, {"max_tokens": 5, "stop": '["a", "b"]', "ignore_eos": True}
    ).generation.params
    assert params == SamplingParams(max_tokens=5, stop=["a", "b"], ignore_eos=True)


def test_sampling_parameters_win_over_request_parameters() -> None:
    assert params_of({"max_tokens": 7, "top_k": None}, {"max_tokens": 5, "top_k": 3}) == SamplingParams(
        max_tokens=7, top_k=3
    )


@pytest.mark.parametrize("source", ["tensor", "parameters"])
def test_unknown_keys_are_named(source: str) -> None:
    values = {"tempreature": 1}
    inputs = {"text_input": text("hi")} | (
        {"sampling_parameters": text(json.dumps(values))} if source == "tensor" else {}
    )
    error = refused(inputs, values if source == "parameters" else None)
    assert error.code is ErrorCode.INVALID_ARG
    assert "'tempreature'" in str(error)


def test_parameters_of_the_transport_and_of_others_pass() -> None:
    parameters = {
        "id": "x", "triton_enable_empty_final_response": True, "binary_data_output": False, "sequence_id": 4,
        "sequence_start": True, "sequence_end": False, "x-trace": "abc",
    }  # fmt: skip
    assert (
        parse({"text_input": text("hi")}, parameters, ignored=("x-trace",)).generation.params
        == SamplingParams()
    )
    assert "'x-trace'" in str(refused({"text_input": text("hi")}, parameters))


def test_priority_timeout_and_salt() -> None:
    generation = parse(
        {"text_input": text("hi")}, {"priority": "3", "timeout": 2_500_000, "cache_salt": "s"}
    ).generation
    assert (generation.priority, generation.timeout_s, generation.cache_salt) == (3, 2.5, "s")
    assert parse({"text_input": text("hi")}, timeout=1_000_000).generation.timeout_s == 1.0
    sampling = {"text_input": text("hi"), "sampling_parameters": text('{"priority": -1, "timeout": 1000}')}
    assert parse(sampling, timeout=5).generation.priority == -1
    assert parse(sampling, timeout=5).generation.timeout_s == 0.001
    for bad in (
        {"priority": 2**40},
        {"timeout": -1},
        {"priority": "soon"},
        {"cache_salt": "s" * 300},
        {"timeout": 1e300},
    ):
        assert repr(next(iter(bad))) in str(refused({"text_input": text("hi")}, bad))


def test_flags_as_tensors_and_as_request_parameters() -> None:
    inputs = {
        "text_input": text("hi"),
        "stream": flag(True),
        "return_token_ids": flag(True),
        "return_timings": flag(False),
    }
    options = parse(inputs, {"return_finish_reason": "true", "stream": False}).options
    assert options.stream
    assert options.outputs == {"token_ids", "finish_reason"}
    assert "'stream'" in str(refused({"text_input": text("hi")}, {"stream": "maybe"}))


def test_echo_rules() -> None:
    error = refused({"text_input": text("hi"), "stream": flag(True), "exclude_input_in_output": flag(False)})
    assert str(error) == (
        "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
    )
    assert error.code is ErrorCode.INVALID_ARG
    assert not parse({"text_input": text("hi"), "exclude_input_in_output": flag(True)}).options.echo
    assert not parse({"text_input": text("hi"), "stream": flag(True)}).options.echo
    ids, chat = np.array([1], np.int32), text('[{"role": "user", "content": "hi"}]')
    assert not parse({"input_ids": ids}).options.echo
    assert not parse({"messages": chat}).options.echo
    assert parse({"messages": chat, "exclude_input_in_output": flag(False)}).options.echo
    assert "'input_ids'" in str(refused({"input_ids": ids, "exclude_input_in_output": flag(False)}))


def test_one_prompt_in_one_of_three_forms() -> None:
    ids, chat = np.array([3, 1, 2], np.int32), text('[{"role": "user", "content": "hi"}]')
    assert parse({"input_ids": ids}).generation.prompt == [3, 1, 2]
    assert parse({"text_input": text(""), "input_ids": ids}).generation.prompt == [3, 1, 2]
    assert "required" in str(refused({"stream": flag(True)}))
    assert "exclude each other" in str(refused({"text_input": text("hi"), "input_ids": ids}))
    assert "exclude each other" in str(refused({"messages": chat, "input_ids": ids}))


def test_chat() -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}], "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False,
        "continue_final_message": True,
    }  # fmt: skip
    prompt = parse({"messages": text(json.dumps(body))}).generation.prompt
    assert prompt == ChatInput(
        messages=body["messages"],
        tools=body["tools"],
        add_generation_prompt=False,
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False},
    )
    without_tools = parse({"messages": text(json.dumps(body | {"tool_choice": "none"}))}).generation.prompt
    assert isinstance(without_tools, ChatInput)
    assert without_tools.tools is None


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("[", "not valid JSON"),
        ("{}", "'messages'"),
        ("[]", "'messages'"),
        ('"hi"', "JSON list"),
        ('[{"content": "no role"}]', "'role'"),
        ('[{"role": 5}]', "'role'"),
        ('{"messages": [{"role": "user"}], "chat_template": "{{ x }}"}', "'chat_template'"),
        ('{"messages": [{"role": "user"}], "tools": {}}', "'tools'"),
        ('{"messages": [{"role": "user"}], "add_generation_prompt": 1}', "'add_generation_prompt'"),
        ('{"messages": [{"role": "user"}], "chat_template_kwargs": []}', "'chat_template_kwargs'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"messages": ' + "[" * 80 + "]" * 80 + "}", "nested too deeply"),
    ],
)
def test_bad_chats_are_refused(body: str, complaint: str) -> None:
    error = refused({"messages": text(body)})
    assert error.code is ErrorCode.INVALID_ARG
    assert complaint in str(error)


def test_what_is_not_served_is_unsupported() -> None:
    chat = text('{"messages": [{"role": "user"}], "tool_choice": "required"}')
    hi = {"text_input": text("hi")}
    for inputs in (
        hi | {"image": text("aGk=")},
        {"messages": chat},
        hi | {"sampling_parameters": text('{"lora_name": "a"}')},
    ):
        assert isinstance(refused(inputs), UnsupportedError)


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"text_input": text(b"\xff\xfe")}, "'text_input' is not valid UTF-8 at byte 0"),
        ({"text_input": text("a", "b")}, "'text_input' must be one string"),
        ({"text_input": np.array([1], np.int32)}, "'text_input' must be one string"),
        ({"text_input": text("x" * (MAX_PROMPT_BYTES + 1))}, "at most"),
        ({"text_input": text("hi"), "sampling_parameters": text("{")}, "not valid JSON"),
        ({"text_input": text("hi"), "sampling_parameters": text("[]")}, "must be a JSON object"),
        ({"text_input": text("hi"), "sampling_parameters": text(b'{"stop": "\xff"}')}, "not valid JSON"),
        ({"text_input": text("hi"), "sampling_parameters": text('{"temperature": NaN}')}, "not valid JSON"),
        ({"text_input": text("hi"), "sampling_parameters": text(" " * (MAX_JSON_BYTES + 1))}, "at most"),
        ({"text_input": text("hi"), "sampling_parameters": text('{"top_p": 5}')}, "'top_p'"),
        (
            {"text_input": text("hi"), "sampling_parameters": text('{"stop": ' + "[" * 9999)},
            "nested too deeply",
        ),
        ({"text_input": text("hi"), "stream": np.array([1], np.int32)}, "'stream' must be one BOOL"),
        ({"text_input": text("hi"), "stream": np.array([], np.bool_)}, "'stream' must be one BOOL"),
        ({"input_ids": np.array([[1]], np.int32)}, "'input_ids' must be INT32 of one dimension"),
        ({"input_ids": np.array([1], np.int64)}, "'input_ids' must be INT32 of one dimension"),
    ],
)
def test_malformed_inputs_are_refused(inputs: dict, complaint: str) -> None:
    error = refused(inputs)
    assert error.code is ErrorCode.INVALID_ARG
    assert complaint in str(error)


def test_malformed_request_parameters_are_refused() -> None:
    assert "the request parameters" in str(refused({"text_input": text("hi")}, "{nonsense"))

    class BrokenRequest(Request):
        def parameters(self) -> str:
            return b"\xff".decode()

    with pytest.raises(InvalidRequestError, match="not valid UTF-8"):
        RawRequest.take(BrokenRequest())


def test_a_cumulative_logprob_makes_the_engine_compute_it() -> None:
    inputs = {
        "text_input": text("hi"),
        "return_cumulative_logprob": flag(True),
        "return_logprobs": flag(True),
    }
    parsed = parse(inputs)
    assert parsed.generation.params.logprobs == 0
    assert not parsed.options.wants_logprobs
    asked = parse(inputs | {"sampling_parameters": text('{"logprobs": 2}')})
    assert asked.generation.params.logprobs == 2
    assert asked.options.wants_logprobs


def test_requests_without_text_count_tokens_as_content() -> None:
    parsed = parse({"text_input": text("hi"), "sampling_parameters": text('{"detokenize": false}')})
    assert parsed.options.tokens_are_content
    assert parsed.generation.params == msgspec.structs.replace(SamplingParams(), detokenize=False)
