"""What clients of every kind are to agree on, and the raw ways of asking: tritonclient and plain HTTP."""

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from charonia.outputs import RequestOutput

TIMEOUT_S = 120.0
RETURNS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens",
           "token_ids", "timings")  # fmt: skip

Responses = list[dict[str, list[Any]]]
"""Each response of one request: flat values by output name, strings decoded."""


@dataclass(frozen=True)
class Ask:
    """A prompt (exactly one of the three) and how to continue it."""

    params: Mapping[str, Any]
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None

    def inputs(self, *, stream: bool) -> dict[str, Any]:
        """The model's inputs by name, asking for every optional output."""
        inputs: dict[str, Any] = {"stream": stream, "sampling_parameters": json.dumps(self.params)}
        if self.text is not None:
            inputs["text_input"] = self.text
        elif self.token_ids is not None:
            inputs["input_ids"] = list(self.token_ids)
        else:
            inputs["messages"] = json.dumps(self.messages)
        return inputs | {"exclude_input_in_output": True} | {f"return_{name}": True for name in RETURNS}


@dataclass
class Answer:
    """All that was generated for one request; one entry per sequence."""

    texts: list[str]
    finish_reasons: list[str]
    num_input_tokens: int
    token_ids: list[list[int]]
    cumulative_logprobs: list[float]
    logprobs: list[list[dict[str, dict[str, Any]]] | None]

    @classmethod
    def of_llm(cls, output: RequestOutput) -> "Answer":
        """What the offline engine has generated."""
        return cls(
            texts=[sequence.text for sequence in output.outputs],
            finish_reasons=[str(sequence.finish_reason) for sequence in output.outputs],
            num_input_tokens=len(output.prompt_token_ids),
            token_ids=[list(sequence.token_ids) for sequence in output.outputs],
            cumulative_logprobs=[sequence.cumulative_logprob for sequence in output.outputs],
            logprobs=[
                None
                if sequence.logprobs is None
                else [
                    {
                        str(token): {"logprob": e.logprob, "rank": e.rank, "decoded_token": e.decoded_token}
                        for token, e in position.items()
                    }
                    for position in sequence.logprobs
                ]
                for sequence in output.outputs
            ],
        )

    @classmethod
    def of_responses(cls, responses: Responses) -> "Answer":
        """Join the responses of one request, having checked what the contract says of each of them."""
        *early, last = responses
        count = len(last["text_output"])
        texts, ids = [""] * count, [[] for _ in range(count)]
        logprobs: list[Any] = [[] for _ in range(count)]
        for response in responses:
            assert set(response) == {"text_output", *RETURNS}
            lengths = response["num_output_tokens"]
            assert sum(lengths) > 0
            flat = iter(response["token_ids"])
            for i in range(count):
                texts[i] += response["text_output"][i]
                new = [next(flat) for _ in range(lengths[i])]
                ids[i] += new
                positions = json.loads(response["logprobs"][i])
                assert positions is None or len(positions) == len(new)
                logprobs[i] = None if positions is None else logprobs[i] + positions
            assert not list(flat), "as many ids as num_output_tokens says"
        for response in early:
            assert any(response["text_output"]), "no chunk without text"
            assert "None" in response["finish_reason"]
        assert "None" not in last["finish_reason"]
        timings = json.loads(last["timings"][0])
        assert 0 <= timings["queue_s"] <= timings["first_token_s"] <= timings["total_s"] < TIMEOUT_S
        return cls(
            texts, last["finish_reason"], last["num_input_tokens"][0], ids, last["cumulative_logprob"], logprobs
        )  # fmt: skip


def assert_same(got: Answer, expected: Answer) -> None:
    """Text, ids, reasons and counts are equal; log-probabilities are so up to rounding (float32 on the wire)."""
    fields = ("texts", "token_ids", "finish_reasons", "num_input_tokens")
    assert {name: getattr(got, name) for name in fields} == {name: getattr(expected, name) for name in fields}
    for total, reference_total in zip(got.cumulative_logprobs, expected.cumulative_logprobs, strict=True):
        assert abs(total - reference_total) < 1e-3
    for mine, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        assert (mine is None) == (theirs is None)
        for position, reference in zip(mine or [], theirs or [], strict=True):
            assert list(position) == list(reference)
            for token, entry in position.items():
                assert entry["decoded_token"] == reference[token]["decoded_token"]
                assert entry["rank"] == reference[token]["rank"]
                assert abs(entry["logprob"] - reference[token]["logprob"]) < 1e-3
            assert sum(entry["rank"] == 1 for entry in position.values()) <= 1


# ---- tritonclient ----


def _tensors(module: Any, values: Mapping[str, Any]) -> list[Any]:
    made = []
    for name, value in values.items():
        if isinstance(value, bool):
            array, kind = np.array([value]), "BOOL"
        elif isinstance(value, str):
            array, kind = np.array([value.encode()], dtype=object), "BYTES"
        else:
            array, kind = np.array(value, np.int32), "INT32"
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def _values(result: Any) -> dict[str, list[Any]]:
    outputs = {}
    for output in result.get_response().outputs:
        values = result.as_numpy(output.name).tolist()
        outputs[output.name] = [value.decode() if isinstance(value, bytes) else value for value in values]
    return outputs


def triton_grpc(url: str, asks: Mapping[str, Ask], *, stream: bool) -> dict[str, Answer]:
    """All at once on one stream of `tritonclient.grpc`, half-closed right after sending."""
    received: queue.Queue[tuple[Any, Any]] = queue.Queue()
    gathered: dict[str, Responses] = {name: [] for name in asks}
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: received.put((result, error)))
        for name, ask in asks.items():
            inputs = _tensors(grpcclient, ask.inputs(stream=stream))
            client.async_stream_infer("llm", inputs, request_id=name, enable_empty_final_response=True)
        client.stop_stream()  # waits for every response
        left = len(asks)
        while left:
            result, error = received.get(timeout=TIMEOUT_S)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                gathered[response.id].append(_values(result))
            left -= response.parameters["triton_final_response"].bool_param
    return {name: Answer.of_responses(responses) for name, responses in gathered.items()}


async def triton_aio(url: str, asks: Mapping[str, Ask]) -> dict[str, Answer]:
    """All at once, each on a stream of `tritonclient.grpc.aio` of its own."""

    async def requests(name: str, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": "llm",
            "inputs": _tensors(aioclient, ask.inputs(stream=True)),
            "request_id": name,
        }

    async def run(client: Any, name: str, ask: Ask) -> Answer:
        responses: Responses = []
        async for result, error in client.stream_infer(requests(name, ask)):
            if error is not None:
                raise error
            assert result.get_response().id == name
            if result.get_response().outputs:
                responses.append(_values(result))
        return Answer.of_responses(responses)

    async with aioclient.InferenceServerClient(url) as client:
        answers = await asyncio.gather(*(run(client, name, ask) for name, ask in asks.items()))
    return dict(zip(asks, answers, strict=True))


# ---- plain HTTP ----


def _from_json(body: str) -> dict[str, list[Any]]:
    outputs = json.loads(body)
    assert "error" not in outputs, outputs
    for name in ("model_name", "model_version", "id"):
        outputs.pop(name, None)
    # Triton writes a tensor of one element as that element.
    return {name: value if isinstance(value, list) else [value] for name, value in outputs.items()}


def _each(asks: Mapping[str, Ask], run: Callable[[Ask], Answer]) -> dict[str, Answer]:
    """All at once, each on a thread of its own."""
    with ThreadPoolExecutor(len(asks)) as pool:
        return dict(zip(asks, pool.map(run, asks.values()), strict=True))


def http_generate(url: str, asks: Mapping[str, Ask]) -> dict[str, Answer]:
    """Through `/generate`, the sampling parameters at the top level where they are scalars."""

    def run(ask: Ask) -> Answer:
        body = ask.inputs(stream=False)
        if all(isinstance(value, str | int | float) for value in ask.params.values()):
            del body["sampling_parameters"]
            body |= ask.params
        response = httpx.post(f"{url}/v2/models/llm/generate", json=body, timeout=TIMEOUT_S)
        assert response.status_code == 200, response.text
        return Answer.of_responses([_from_json(response.text)])

    return _each(asks, run)


def http_stream(url: str, asks: Mapping[str, Ask]) -> dict[str, Answer]:
    """Through `/generate_stream` (server-sent events)."""

    def run(ask: Ask) -> Answer:
        body = ask.inputs(stream=True)
        response = httpx.post(f"{url}/v2/models/llm/generate_stream", json=body, timeout=TIMEOUT_S)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, end = response.text.split("\n\n")
        assert end == "" and all(event.startswith("data: ") for event in events)
        return Answer.of_responses([_from_json(event.removeprefix("data: ")) for event in events])

    return _each(asks, run)
