"""POST /tokenize and /detokenize."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from charonia_client.gateway.context import context_of
from charonia_client.gateway.gateway_state import gateway_of
from charonia_client.gateway.protocol import DetokenizeRequest, TokenizeRequest, message_values
from charonia_client.gateway.sse import unless_disconnected
from charonia_client.gateway.triton_model import checked_text

router = APIRouter()


@router.post("/tokenize", summary="Token ids of a text or a chat")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """`count`, `max_model_len`, `tokens`, and `token_strs` where asked for."""
    gateway, context = gateway_of(request), context_of(request)
    gateway.served_name(body.model)
    work = gateway.model.utility("tokenize", _tokenize_input(body), context)
    values = await unless_disconnected(request, work)
    answer = {
        "count": len(values["tokens"]),
        "max_model_len": values.get("max_model_len"),
        "tokens": values["tokens"],
        "token_strs": values.get("token_strs"),
    }
    return Response(to_json(answer), media_type="application/json")


def _tokenize_input(body: TokenizeRequest) -> dict[str, Any]:
    given: dict[str, Any] = {"return_token_strs": bool(body.return_token_strs)}
    if body.add_special_tokens is not None:
        given["add_special_tokens"] = body.add_special_tokens
    if body.prompt is not None:
        return {**given, "prompt": checked_text(body.prompt, "prompt")}
    given["messages"] = message_values(body.messages or [])
    if body.tools:
        given["tools"] = [tool.model_dump(exclude_unset=True) for tool in body.tools]
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    return given


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """`prompt`: the text, special tokens spelt out."""
    gateway, context = gateway_of(request), context_of(request)
    gateway.served_name(body.model)
    work = gateway.model.utility("detokenize", {"tokens": body.tokens}, context)
    values = await unless_disconnected(request, work)
    return Response(to_json({"prompt": values["prompt"]}), media_type="application/json")
