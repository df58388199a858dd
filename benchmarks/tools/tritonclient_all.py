"""tritonclient in its three forms against a running server: gRPC streaming, gRPC with asyncio, metadata over HTTP."""

import argparse
import asyncio
import json
import queue
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as sync_grpc
import tritonclient.grpc.aio as aio_grpc
import tritonclient.http as sync_http

PROMPT = "The capital of France is"
SAMPLING = {"max_tokens": 5, "temperature": 0}


def request_inputs() -> list[Any]:
    """A prompt, to be streamed."""
    values = {
        "text_input": (np.array([PROMPT.encode()], dtype=object), "BYTES"),
        "sampling_parameters": (np.array([json.dumps(SAMPLING).encode()], dtype=object), "BYTES"),
        "stream": (np.array([True]), "BOOL"),
    }
    inputs = []
    for name, (array, data_type) in values.items():
        made = sync_grpc.InferInput(name, [1], data_type)
        made.set_data_from_numpy(array)
        inputs.append(made)
    return inputs


def text_of(result: Any) -> str:
    """A response's text; the empty response that ends a stream has none."""
    texts = result.as_numpy("text_output")
    return "" if texts is None else texts[0].decode()


def stream(url: str, model: str) -> list[str]:
    """The pieces of an answer, over one gRPC stream."""
    received: queue.Queue[Any] = queue.Queue()
    pieces = []
    with sync_grpc.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: received.put(error or result))
        client.async_stream_infer(model, request_inputs(), enable_empty_final_response=True)
        is_final = False
        while not is_final:
            result = received.get(timeout=60)
            if isinstance(result, Exception):
                raise result
            pieces.append(text_of(result))
            is_final = result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    return [piece for piece in pieces if piece]


async def stream_with_asyncio(url: str, model: str) -> list[str]:
    """The same with asyncio: the stream ends once all its requests are sent and answered."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": model, "inputs": request_inputs()}

    pieces = []
    async with aio_grpc.InferenceServerClient(url) as client:
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            pieces.append(text_of(result))
    return pieces


def metadata(url: str, model: str) -> str:
    """What the model says of itself over HTTP, where decoupled models are served by /generate alone."""
    with sync_http.InferenceServerClient(url) as client:
        described = client.get_model_metadata(model)
        names = [entry["name"] for entry in described["inputs"]]
        return f"{described['name']} ready={client.is_model_ready(model)} inputs={', '.join(names)}"


def main() -> None:
    """Run all three and print what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", default="localhost:8000")
    parser.add_argument("--grpc", default="localhost:8001")
    parser.add_argument("--model", default="llm")
    options = parser.parse_args()
    print("tritonclient.grpc    ", stream(options.grpc, options.model))
    print("tritonclient.grpc.aio", asyncio.run(stream_with_asyncio(options.grpc, options.model)))
    print("tritonclient.http    ", metadata(options.http, options.model))


if __name__ == "__main__":
    main()
