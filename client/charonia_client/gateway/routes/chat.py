"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from charonia_client.gateway.chat import ChatPlan, plan_chat
from charonia_client.gateway.chat_answer import answer_chat
from charonia_client.gateway.chat_stream import stream_chat
from charonia_client.gateway.chunks import ChunkWriter
from charonia_client.gateway.context import RequestContext, context_of
from charonia_client.gateway.gateway_state import Gateway, gateway_of, now
from charonia_client.gateway.protocol import ChatRequest
from charonia_client.gateway.sse import EventStream, unless_disconnected

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """One answer, or with ``stream`` its chunks as server-sent events."""
    return await unless_disconnected(request, _answer(gateway_of(request), body, context_of(request)))


async def _answer(gateway: Gateway, body: ChatRequest, context: RequestContext) -> Response:
    name = gateway.served_name(body.model)
    plan = await plan_chat(body, gateway.settings, gateway.model, context)
    prompt_token_ids = await _prompt_token_ids(gateway, plan, context)
    answer_id = f"chatcmpl-{context.request_id}"
    if body.streams:
        writer = ChunkWriter("chat.completion.chunk", answer_id, now(), name, usage=body.includes_usage)
        return await EventStream.start(stream_chat(gateway.model, plan, writer, prompt_token_ids))
    found = await answer_chat(gateway.model, plan)
    answer = {
        "id": answer_id,
        "object": "chat.completion",
        "created": now(),
        "model": name,
        "choices": found.choices,
        "usage": found.counts.usage(),
    }
    if found.prompt_logprobs is not None:
        answer["prompt_logprobs"] = found.prompt_logprobs
    if prompt_token_ids is not None:
        answer["prompt_token_ids"] = prompt_token_ids
    return Response(to_json(answer), media_type="application/json")


async def _prompt_token_ids(gateway: Gateway, plan: ChatPlan, context: RequestContext) -> list[int] | None:
    if not plan.request.return_token_ids:
        return None
    values = await gateway.model.utility("tokenize", plan.prompt, context)
    return list(values["tokens"])
