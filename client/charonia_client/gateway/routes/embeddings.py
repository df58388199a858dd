"""POST /v1/embeddings."""

import base64
import json
import struct
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json as to_json_bytes

from charonia_client.errors import InternalServerError
from charonia_client.gateway.context import RequestContext, context_of
from charonia_client.gateway.gateway_state import gateway_of
from charonia_client.gateway.merge import results
from charonia_client.gateway.protocol import EmbeddingRequest
from charonia_client.gateway.sse import unless_disconnected
from charonia_client.gateway.triton_model import TritonModel, checked_text, to_json
from charonia_client.requests import InputValue

router = APIRouter()


@router.post("/v1/embeddings", summary="Vectors of texts or token ids")
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """One vector for each input, in order."""
    gateway, context = gateway_of(request), context_of(request)
    name = gateway.served_name(body.model)
    vectors = await unless_disconnected(request, _embed_all(gateway.model, body, context))
    num_tokens = sum(tokens for _, tokens in vectors)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, (vector, _) in enumerate(vectors)
    ]
    answer = {
        "object": "list",
        "data": data,
        "model": name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return Response(to_json_bytes(answer), media_type="application/json")


async def _embed_all(
    model: TritonModel, body: EmbeddingRequest, context: RequestContext
) -> list[tuple[list[float], int]]:
    """Vector and number of tokens of each input."""
    inputs = body.inputs()

    async def embed(number: int) -> tuple[list[float], int]:
        part = number if len(inputs) > 1 else None
        return await _embed(model, inputs[number], body.dimensions, context, part)

    return await results(embed, range(len(inputs)))


async def _embed(
    model: TritonModel,
    subject: str | list[int],
    dimensions: int | None,
    context: RequestContext,
    part: int | None,
) -> tuple[list[float], int]:
    if isinstance(subject, str):
        checked_text(subject, "input")
    wanted: dict[str, Any] = {"input": subject}
    if dimensions is not None:
        wanted["pooling_params"] = {"dimensions": dimensions}
    inputs: dict[str, InputValue] = {
        "embedding_request": to_json(wanted, "input"),
        "return_num_input_tokens": True,
    }
    response = await model.single(model.request(inputs, context, part=part))
    try:
        vector = json.loads(response.outputs["text_output"][0])
        if not isinstance(vector, list):
            raise TypeError(f"a vector, got {type(vector).__name__}")
        return vector, int(response.outputs["num_input_tokens"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        message = f"the model's response does not follow the serving contract: {error!r}"
        raise InternalServerError(message, url=model.url, model=model.name) from error


def _encoded(vector: list[float], encoding: str | None) -> list[float] | str:
    """The vector as numbers, or as base64 of little-endian fp32, which the official client asks for."""
    if encoding != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
