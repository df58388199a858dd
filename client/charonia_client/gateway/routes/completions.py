"""POST /v1/completions."""

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from charonia_client.gateway.chunks import ChunkWriter
from charonia_client.gateway.completion import answer_completion, plan_completion, stream_completion
from charonia_client.gateway.context import RequestContext, context_of
from charonia_client.gateway.gateway_state import Gateway, gateway_of, now
from charonia_client.gateway.protocol import CompletionRequest
from charonia_client.gateway.sse import EventStream, unless_disconnected

router = APIRouter()


@router.post("/v1/completions", summary="Continue texts or token ids")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """One answer for all prompts, or with ``stream`` its chunks as server-sent events."""
    return await unless_disconnected(request, _answer(gateway_of(request), body, context_of(request)))


async def _answer(gateway: Gateway, body: CompletionRequest, context: RequestContext) -> Response:
    name = gateway.served_name(body.model)
    plans = await plan_completion(body, gateway.settings, gateway.model, context)
    answer_id = f"cmpl-{context.request_id}"
    if body.streams:
        writer = ChunkWriter("text_completion", answer_id, now(), name, usage=body.includes_usage)
        return await EventStream.start(stream_completion(gateway.model, body, plans, writer))
    choices, counts = await answer_completion(gateway.model, body, plans)
    answer = {
        "id": answer_id,
        "object": "text_completion",
        "created": now(),
        "model": name,
        "choices": choices,
        "usage": counts.usage(),
    }
    return Response(to_json(answer), media_type="application/json")
