"""The whole answer of a chat completion."""

from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from charonia_client.gateway.chat import ChatPlan
from charonia_client.gateway.generation import Generation, PositionLogprobs, SequenceDelta, TokenCounts
from charonia_client.gateway.logprobs import chat_logprobs
from charonia_client.gateway.parsers import ToolCallDelta
from charonia_client.gateway.protocol import reasoning_members
from charonia_client.gateway.triton_model import TritonModel


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """The choices, in order, and the counts. prompt_logprobs: at each position of the prompt, if asked for."""

    choices: list[dict[str, Any]]
    counts: TokenCounts
    prompt_logprobs: Sequence[PositionLogprobs | None] | None


async def answer_chat(model: TritonModel, plan: ChatPlan) -> ChatAnswer:
    """The whole answer."""
    generation = Generation(model, plan.generate, plan.request.num_choices)
    choices: list[dict[str, Any]] = []
    async with aclosing(generation.deltas()) as responses:
        async for deltas in responses:
            choices += [_choice(plan, delta) for delta in deltas]
    return ChatAnswer(choices, generation.counts, generation.prompt_logprobs)


def _choice(plan: ChatPlan, delta: SequenceDelta) -> dict[str, Any]:
    message, calls = _message(plan, delta.text)
    choice: dict[str, Any] = {
        "index": delta.index,
        "message": message,
        "logprobs": None,
        "finish_reason": plan.finish_reason(delta.finish_reason or "stop", saw_tool_calls=calls),
        "stop_reason": delta.stop_reason,
    }
    if delta.logprobs is not None:
        choice["logprobs"] = chat_logprobs(delta.logprobs, plan.request.top_logprobs or 0)
    if plan.request.return_token_ids:
        choice["token_ids"] = list(delta.token_ids or ())
    return choice


def _message(plan: ChatPlan, text: str) -> tuple[dict[str, Any], bool]:
    """The message, and whether it has tool calls."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    parser = plan.parser()
    if parser is None:
        return message, False
    pieces = (parser.push(text), parser.finish())
    message["content"] = "".join(piece.content for piece in pieces) or None
    reasoning = "".join(piece.reasoning for piece in pieces)
    if reasoning and plan.request.include_reasoning is not False:
        message |= reasoning_members(reasoning)
    calls = _joined([call for piece in pieces for call in piece.tool_calls])
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    return message, bool(calls)


def _joined(deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    def pieces(index: int) -> Iterable[ToolCallDelta]:
        return (delta for delta in deltas if delta.index == index)

    calls: list[dict[str, Any]] = []
    for index in sorted({delta.index for delta in deltas}):
        call_id = next(delta.id for delta in pieces(index) if delta.id is not None)
        name = next(delta.name for delta in pieces(index) if delta.name is not None)
        arguments = "".join(delta.arguments for delta in pieces(index))
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
    return calls
