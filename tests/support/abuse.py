"""Requests of every kind that a server on the internet gets, right and wrong, and what each has to come to."""

import asyncio
import json
import random
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import httpx
from tritonclient.grpc import service_pb2, service_pb2_grpc

PATIENCE_S = 120.0
"""No request of any kind may take longer to come to its end."""

LONG = {"max_tokens": 7000, "ignore_eos": True, "temperature": 0.0}
GENERATE, STREAM = "/v2/models/llm/generate", "/v2/models/llm/generate_stream"
_CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True)
class Canary:
    """A prompt whose greedy continuation is known: an answer that differs has been mixed up with another's."""

    prompt: str
    token_ids: list[int]
    text: str


class Target:
    """A service under fire; used on one event loop."""

    def __init__(self, http_url: str, grpc_url: str, canaries: Sequence[Canary]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=http_url, timeout=PATIENCE_S, limits=limits, trust_env=False)
        self.host, _, port = http_url.removeprefix("http://").partition(":")
        self.port = int(port)
        self.channel = grpc.aio.insecure_channel(grpc_url, options=_CHANNEL_OPTIONS)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.canaries = canaries

    async def close(self) -> None:
        """Let go of every connection."""
        await self.http.aclose()
        await self.channel.close()


# ---- gRPC messages ----


def string(value: str | bytes) -> tuple[str, list[int], bytes]:
    """A BYTES tensor of one element."""
    data = value if isinstance(value, bytes) else value.encode()
    return "BYTES", [1], struct.pack("<I", len(data)) + data


def boolean(value: bool) -> tuple[str, list[int], bytes]:
    """A BOOL tensor of one element."""
    return "BOOL", [1], bytes([value])


def ids(values: Sequence[int]) -> tuple[str, list[int], bytes]:
    """An INT32 tensor."""
    return "INT32", [len(values)], struct.pack(f"<{len(values)}i", *values)


def message(
    inputs: Mapping[str, tuple[str, list[int], bytes]], *, request_id: str = "", model: str = "llm",
    version: str = "", outputs: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A ModelInferRequest, not checked by any client library."""
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, (datatype, shape, data) in inputs.items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(data)
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def text_message(prompt: str | bytes, params: Any = None, *, stream: bool = True, **extra: Any) -> Any:
    """The usual request; `params` may be an object or JSON text, right or wrong."""
    inputs = {"text_input": string(prompt), "stream": boolean(stream), "return_token_ids": boolean(True)}
    if params is not None:
        inputs["sampling_parameters"] = string(
            params if isinstance(params, str | bytes) else json.dumps(params)
        )
    return message(inputs, **extra)


async def converse(target: Target, requests: Sequence[Any]) -> list[Any]:
    """All messages that come back on one stream, which is half-closed after the requests."""

    async def send() -> AsyncIterator[Any]:
        for request in requests:
            yield request

    return [answer async for answer in target.stub.ModelStreamInfer(send())]


def token_ids(answers: Sequence[Any]) -> list[int]:
    """Those of one request's responses."""
    found: list[int] = []
    for answer in answers:
        assert not answer.error_message, answer.error_message
        response = answer.infer_response
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.name == "token_ids":
                found += struct.unpack(f"<{len(data) // 4}i", data)
    return found


Kind = Callable[[Target, random.Random], Awaitable[None]]
KINDS: dict[str, tuple[int, Kind]] = {}
"""Kinds of request by name, each with its weight in the mix."""


def kind(weight: int) -> Callable[[Kind], Kind]:
    """Put a function among the kinds."""

    def note(function: Kind) -> Kind:
        KINDS[function.__name__] = (weight, function)
        return function

    return note


# ---- right ----


def _greedy(canary: Canary) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": len(canary.token_ids), "ignore_eos": True}


@kind(24)
async def grpc_canary(target: Target, rng: random.Random) -> None:
    canary = rng.choice(target.canaries)
    answers = await converse(target, [text_message(canary.prompt, _greedy(canary))])
    assert token_ids(answers) == canary.token_ids


@kind(6)
async def grpc_many_on_one_stream(target: Target, rng: random.Random) -> None:
    chosen = rng.sample(target.canaries, 3)
    requests = [text_message(c.prompt, _greedy(c), request_id=str(i)) for i, c in enumerate(chosen)]
    requests.append(text_message("x", {"no_such": 1}, request_id="wrong"))
    answers = await converse(target, requests)
    for i, canary in enumerate(chosen):
        assert token_ids([a for a in answers if a.infer_response.id == str(i)]) == canary.token_ids
    (error,) = [a.error_message for a in answers if a.error_message]
    assert "no_such" in error


@kind(16)
async def http_canary(target: Target, rng: random.Random) -> None:
    canary = rng.choice(target.canaries)
    body = {"text_input": canary.prompt, "return_token_ids": True, **_greedy(canary)}
    answer = (await target.http.post(GENERATE, json=body)).json()
    assert "error" not in answer, answer
    assert (answer["token_ids"], answer["text_output"]) == (canary.token_ids, canary.prompt + canary.text)


@kind(10)
async def sse_canary(target: Target, rng: random.Random) -> None:
    canary = rng.choice(target.canaries)
    body = {"text_input": canary.prompt, "stream": True, **_greedy(canary)}
    answer = (await target.http.post(STREAM, json=body)).text
    assert '"error"' not in answer, answer[-500:]
    events = answer.split("\n\n")
    assert "".join(json.loads(event[6:])["text_output"] for event in events if event) == canary.text


@kind(3)
async def many_sequences(target: Target, rng: random.Random) -> None:
    params = {"n": rng.choice([2, 16, 128]), "max_tokens": rng.choice([1, 4]), "logprobs": 20, "seed": 1}
    answers = await converse(target, [text_message("Hello", params, stream=rng.random() < 0.5)])
    assert token_ids(answers)


@kind(2)
async def every_parameter_at_its_limit(target: Target, rng: random.Random) -> None:
    params = {
        "stop": ["z" * 1024] * 64, "stop_token_ids": list(range(1024)), "bad_words": ["word " * 50] * 256,
        "logit_bias": {str(token): -100 for token in range(1024)}, "logprobs": 20, "prompt_logprobs": 20,
        "max_tokens": 4, "repetition_penalty": 100.0, "presence_penalty": 2, "frequency_penalty": -2,
        "allowed_token_ids": list(range(2000, 40000)), "min_p": 1, "top_k": 1, "seed": -(2**63),
    }  # fmt: skip
    assert token_ids(await converse(target, [text_message("Hello", params)]))


# ---- gone before the end ----


@kind(8)
async def grpc_cancel(target: Target, rng: random.Random) -> None:
    """After some responses, or before the first."""

    async def send() -> AsyncIterator[Any]:
        yield text_message("Hello " * rng.choice([1, 500, 3000]), LONG)
        await asyncio.sleep(PATIENCE_S)

    call = target.stub.ModelStreamInfer(send())
    count = rng.choice([0, 0, 1, 5])
    if count == 0:
        await asyncio.wait([asyncio.ensure_future(call.read())], timeout=rng.random() * 0.05)
    for _ in range(count):
        answer = await call.read()
        assert not answer.error_message, answer.error_message
    call.cancel()


@kind(8)
async def http_disconnect(target: Target, rng: random.Random) -> None:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    body = json.dumps({"text_input": "Hello " * rng.choice([1, 2000]), "stream": True, **LONG}).encode()
    head = f"POST {STREAM} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    wire = head + body
    if rng.random() < 0.3:
        wire = wire[: rng.randrange(len(wire))]
    writer.write(wire)
    if rng.random() < 0.5 and len(wire) == len(head) + len(body):
        await reader.readuntil(b"data:")
    writer.transport.abort() if rng.random() < 0.5 else writer.close()


@kind(3)
async def slow_reader(target: Target, rng: random.Random) -> None:
    """Takes a few bytes at a time, and yet gets its own text to the end."""
    canary = rng.choice(target.canaries)
    body = json.dumps({"text_input": canary.prompt, "stream": True, **_greedy(canary)}).encode()
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=256)
    writer.write(f"POST {STREAM} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    pieces = []
    while piece := await reader.read(rng.choice([1, 16, 200])):
        pieces.append(piece)
        await asyncio.sleep(rng.random() * 0.02)
    writer.close()
    head, _, answer = b"".join(pieces).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], answer[:300]
    assert b'"error"' not in answer, answer[-300:]
    events = re.findall(rb"^data: (.*)$", answer, re.MULTILINE)
    assert "".join(json.loads(event)["text_output"] for event in events) == canary.text


@kind(3)
async def time_limit(target: Target, rng: random.Random) -> None:
    request = text_message("Hello", LONG, parameters={"timeout": rng.choice([1, 10_000, 50_000])})
    answers = await converse(target, [request])
    texts = [answer.error_message for answer in answers]
    assert any("deadline" in text for text in texts), texts


# ---- wrong ----

DEEP = "[" * 100_000
PARAMS_WRONG: tuple[str | bytes, ...] = (
    "{", "nonsense", "[]", "3", '"x"', "null", "{]", '{"max_tokens": }', DEEP, '{"stop": ' + "[" * 80 + "]" * 80 + "}",
    b"\xff\xfe{}", b'{"stop": "\xc3"}', '{"stop": "\\ud800"}', '{"temperature": NaN}', '{"temperature": Infinity}',
    '{"temperature": 1e999}', '{"temperature": "nan"}', '{"top_p": "inf"}', '{"max_tokens": 0}', '{"max_tokens": -1}',
    '{"max_tokens": 1e30}', '{"max_tokens": 99999999999999999999}', '{"max_tokens": "many"}', '{"max_tokens": [1]}',
    '{"n": 129}', '{"n": 0}', '{"logprobs": 21}', '{"stop": 5.5}', '{"stop": [""]}', '{"stop": [null]}',
    '{"stop": ["' + "x" * 1025 + '"]}', json.dumps({"stop": ["x"] * 65}), '{"stop_token_ids": [-1]}',
    '{"stop_token_ids": [49152]}', '{"logit_bias": {"a": 1}}', '{"logit_bias": {"1": 101}}', '{"logit_bias": [1]}',
    '{"allowed_token_ids": []}', '{"seed": 9223372036854775808}', '{"unknown": 1}', '{"": 1}', '{"\\u0000": 1}',
    '{"top_p": 0}', '{"min_tokens": 5, "max_tokens": 4}', '{"lora_name": "x"}', '{"guided_decoding": {"json": 5}}',
    '{"guided_regex": "(a"}',
    '{"priority": "high"}', '{"priority": 1e300}', '{"timeout": -1}', '{"cache_salt": 5}', "\x00", " { } x",
    json.dumps({"bad_words": ["x" * 257]}), '{"temperature": ' + "9" * 5000 + "}",
)  # fmt: skip


def _wrong_messages() -> dict[str, Callable[[], Any]]:
    hello = {"text_input": string("Hello")}
    return {
        "no inputs": lambda: message({}),
        "empty prompt": lambda: text_message(""),
        "broken utf-8": lambda: text_message(b"abc \xff\xfe def"),
        "cut utf-8": lambda: text_message("é".encode()[:1]),
        "surrogate bytes": lambda: text_message(b"\xed\xa0\x80"),
        "too long": lambda: text_message("word " * 20_000),
        "far too long": lambda: text_message("x" * (2 << 20)),
        "prompt as numbers": lambda: message({"text_input": ids([1, 2])}),
        "two prompts": lambda: message({"text_input": ("BYTES", [2], string("a")[2] + string("b")[2])}),
        "no prompt": lambda: message({"text_input": ("BYTES", [0], b"")}),
        "matrix": lambda: message({"text_input": ("BYTES", [1, 1], string("a")[2])}),
        "negative shape": lambda: message({"text_input": ("BYTES", [-1], string("a")[2])}),
        "vast shape": lambda: message({"text_input": ("BYTES", [2**62], string("a")[2])}),
        "short data": lambda: message({"text_input": ("BYTES", [1], struct.pack("<I", 100) + b"abc")}),
        "length lies": lambda: message({"text_input": ("BYTES", [1], struct.pack("<I", 0xFFFFFFFF) + b"abc")}),
        "no data": lambda: message({"text_input": ("BYTES", [1], b"")}),
        "unknown type": lambda: message({"text_input": ("NONSENSE", [1], b"a")}),
        "stream as text": lambda: message(hello | {"stream": string("true")}),
        "stream of two": lambda: message(hello | {"stream": ("BOOL", [2], b"\1\1")}),
        "stream as float": lambda: message(hello | {"stream": ("FP32", [1], b"\0\0\0\0")}),
        "ids as int64": lambda: message({"input_ids": ("INT64", [1], b"\1" + b"\0" * 7)}),
        "ids out of range": lambda: message({"input_ids": ids([1, 2**31 - 1])}),
        "negative ids": lambda: message({"input_ids": ids([-1])}),
        "no ids": lambda: message({"input_ids": ids([])}),
        "too many ids": lambda: message({"input_ids": ids([7] * 100_000)}),
        "ids and text": lambda: message(hello | {"input_ids": ids([1])}),
        "unknown input": lambda: message(hello | {"txt": string("a")}),
        "unknown output": lambda: message(hello, outputs=["nothing"]),
        "unknown model": lambda: message(hello, model="nothing"),
        "unknown version": lambda: message(hello, version="9"),
        "version no number": lambda: message(hello, version="x"),
        "image": lambda: message(hello | {"image": string("AAAA")}),
        "embedding": lambda: message(hello | {"embedding_request": string("{}")}),
        "echo while streaming": lambda: message(
            hello | {"stream": boolean(True), "exclude_input_in_output": boolean(False)}
        ),
        "chat no json": lambda: message({"messages": string("hi")}),
        "chat empty": lambda: message({"messages": string("[]")}),
        "chat deep": lambda: message({"messages": string(DEEP)}),
        "chat bad role": lambda: message({"messages": string('[{"role": 5, "content": "x"}]')}),
        "chat numbers": lambda: message({"messages": string('[{"role": "user", "content": 1e999}]')}),
        "chat surrogate": lambda: message(
            {"messages": string('[{"role": "user", "content": "\\ud800"}]')}
        ),
        "chat long": lambda: message(
            {"messages": string(json.dumps([{"role": "user", "content": "y " * 20_000}]))}
        ),
        "huge parameters": lambda: text_message("a", b'{"stop": "' + b"x" * (8 << 20) + b'"}'),
        "unknown parameter": lambda: message(hello, parameters={"max_tokns": 3}),
        "parameter no number": lambda: message(hello, parameters={"temperature": float("nan")}),
        "timeout no number": lambda: message(hello, parameters={"timeout": "soon"}),
    }  # fmt: skip


MESSAGES_WRONG = _wrong_messages()


async def refusal(target: Target, request: Any) -> str:
    """The error that a request ends with; a failure if there is none, or if it tells of our insides."""
    try:
        answers = await converse(target, [request])
    except grpc.aio.AioRpcError as error:
        texts = [error.details() or "no details"]
    else:
        texts = [answer.error_message for answer in answers if answer.error_message]
    assert len(texts) == 1, texts
    _check_text(texts[0])
    return texts[0]


def _check_text(text: str) -> None:
    assert text and "Traceback" not in text and "site-packages" not in text and 'File "' not in text
    assert "internal error" not in text, text
    assert len(text) < 2000, text[:2000]


@kind(30)
async def grpc_wrong_parameters(target: Target, rng: random.Random) -> None:
    params = rng.choice(PARAMS_WRONG)
    if params == "null":
        return
    await refusal(target, text_message("Hello", params, stream=rng.random() < 0.5))


@kind(30)
async def grpc_wrong_message(target: Target, rng: random.Random) -> None:
    name = rng.choice(list(MESSAGES_WRONG))
    try:
        await refusal(target, MESSAGES_WRONG[name]())
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


@kind(2)
async def grpc_unary(target: Target, rng: random.Random) -> None:
    """ModelInfer does not serve decoupled models."""
    try:
        await target.stub.ModelInfer(text_message("Hello"))
    except grpc.aio.AioRpcError as error:
        _check_text(error.details() or "")
    else:
        raise AssertionError("answered")


BODIES_WRONG: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"text_input": }', b'{"text_input": 5}', b'{"text_input": ["a", "b"]}',
    b'{"text_input": {"a": 1}}', b'{"text_input": ""}', b'{"text_input": null}', b"{}", b'{"stream": true}',
    b'{"text_input": "a", "stream": "yes"}', b'{"text_input": "a", "max_tokens": "lots"}',
    b'{"text_input": "a", "max_tokens": -5}', b'{"text_input": "a", "nonsense": 1}', b'{"text_input": "\xc3\x28"}',
    b'{"text_input": "a", "temperature": NaN}', b'{"text_input": "a", "temperature": 1e400}',
    b'{"text_input": "a", "stop": ["x"]}', b'{"text_input": "a", "parameters": 5}',
    b'{"text_input": "a", "sampling_parameters": {"max_tokens": 3}}',
    b'{"text_input": "a", "sampling_parameters": "{"}', b'{"text_input": "a", "sampling_parameters": 5}',
    b'{"text_input": "\\ud800"}', b'{"text_input": "a", "input_ids": [1, 2]}', b'{"input_ids": ["a"]}',
    b'{"input_ids": [99999999999]}', b'{"messages": [{"role": "user", "content": "x"}]}',
    b'{"text_input": "' + b"word " * 20_000 + b'"}', b'{"text_input": ' + b"[" * 100_000,
    b'{"text_input": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
)  # fmt: skip


@kind(24)
async def http_wrong_body(target: Target, rng: random.Random) -> None:
    body = rng.choice(BODIES_WRONG)
    path = rng.choice([GENERATE, STREAM])
    response = await target.http.post(path, content=body)
    text = response.text
    assert response.status_code >= 400 or '"error"' in text, (path, body[:100], text[:200])
    _check_text(text)


@kind(4)
async def http_wrong_path(target: Target, rng: random.Random) -> None:
    paths = ["/v2/models/none/generate", "/v2/models/llm/versions/9/generate", "/v2/models/llm/generat",
             "/v2/models/llm/infer", "/v2/models/" + "x" * 5000 + "/generate", "/v2/models/%00/generate",
             "/v2/models/llm%2f..%2f/generate"]  # fmt: skip
    try:
        response = await target.http.post(rng.choice(paths), json={"text_input": "a"})
    except httpx.RemoteProtocolError:
        return  # the server may also hang up
    assert response.status_code >= 400


@kind(4)
async def http_garbage(target: Target, rng: random.Random) -> None:
    """No HTTP at all, or HTTP that lies about its length."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(
        rng.choice(
            [
                rng.randbytes(500),
                b"POST / HTTP/9.9\r\n\r\n",
                f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n".encode(),
                f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
            ]
        )
    )
    await writer.drain()
    await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=0.2)
    writer.transport.abort()


# ---- the mix ----


def mix(count: int, seed: int) -> list[str]:
    """Names of kinds, each at least once, in random order."""
    rng = random.Random(seed)
    weights = [weight for weight, _ in KINDS.values()]
    names = [*KINDS, *rng.choices(list(KINDS), weights, k=count - len(KINDS))]
    rng.shuffle(names)
    return names


async def fire(target: Target, names: Sequence[str], seed: int, concurrency: int) -> list[str]:
    """Send all of them, so many at a time; returns what went wrong."""
    failures: list[str] = []
    waiting = list(enumerate(names))

    async def work() -> None:
        while waiting:
            number, name = waiting.pop()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await KINDS[name][1](target, random.Random(f"{seed}/{number}"))
            except Exception as error:
                failures.append(f"{name} (number {number}): {type(error).__name__}: {str(error)[:500]}")

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return failures
