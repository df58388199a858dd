"""A chat completion as a stream of chunks."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json

from charonia_client.gateway.chat import ChatPlan
from charonia_client.gateway.chunks import ChunkWriter
from charonia_client.gateway.generation import Generation, PositionLogprobs, SequenceDelta
from charonia_client.gateway.logprobs import chat_logprobs
from charonia_client.gateway.parsers import ParsedDelta, ToolCallDelta
from charonia_client.gateway.protocol import reasoning_members
from charonia_client.gateway.sse import DONE
from charonia_client.gateway.triton_model import TritonModel

_ROLE = b'"delta":{"role":"assistant","content":""}'
_NOTHING = b'"delta":{}'


async def stream_chat(
    model: TritonModel, plan: ChatPlan, writer: ChunkWriter, prompt_token_ids: list[int] | None
) -> AsyncGenerator[bytes, None]:
    """The events of the answer, each time as many as have come."""
    request = plan.request
    tells_counts = request.has_continuous_usage
    generation = Generation(model, plan.generate, request.num_choices)
    choices = [_Choice(plan) for _ in range(request.num_choices)]
    async with aclosing(generation.deltas()) as responses:
        async for deltas in responses:
            events: list[bytes] = []
            for delta in deltas:
                counts = delta.counts if tells_counts else None
                choice = choices[delta.index]
                if not choice.started:
                    choice.started = True
                    extra = {} if prompt_token_ids is None else {"prompt_token_ids": prompt_token_ids}
                    events.append(writer.chunk(delta.index, _ROLE, None, extra=extra, counts=counts))
                events.extend(
                    writer.chunk(delta.index, body, reason, logprobs, extra=extra, counts=counts)
                    for body, reason, logprobs, extra in choice.pieces(delta)
                )
            if events:
                yield b"".join(events)
    yield writer.usage(generation.counts) + DONE if request.includes_usage else DONE


Piece = tuple[bytes, str | None, Any, dict[str, Any] | None]
"""The `delta` member, the finish reason, the logprobs and further members of one chunk."""


class _Choice:
    """One sequence: its parser, and what waits for a chunk to go with."""

    def __init__(self, plan: ChatPlan) -> None:
        self.started = False
        self._plan = plan
        self._parser = plan.parser()
        self._with_reasoning = plan.request.include_reasoning is not False
        self._num_top = plan.request.top_logprobs or 0
        self._logprobs: list[PositionLogprobs] = []
        self._token_ids: list[int] = []
        self._stop_reason: int | str | None = None

    def pieces(self, delta: SequenceDelta) -> Iterator[Piece]:
        """The chunks for what is new; none where it is held back."""
        if delta.logprobs:
            self._logprobs.extend(delta.logprobs)
        if delta.token_ids:
            self._token_ids.extend(delta.token_ids)
        self._stop_reason = delta.stop_reason
        if self._parser is None:
            bodies = [b'"delta":{"content":%b}' % to_json(delta.text)] if delta.text else []
            reason = delta.finish_reason
        else:
            bodies, reason = self._parsed(delta)
        if reason is not None and not bodies:
            bodies = [_NOTHING]
        for number, body in enumerate(bodies, 1):
            last = number == len(bodies)
            reason_told = reason if last else None
            yield body, reason_told, self._take_logprobs(), self._take_extra(ends=reason_told is not None)

    def _parsed(self, delta: SequenceDelta) -> tuple[list[bytes], str | None]:
        parser = self._parser
        assert parser is not None
        bodies = self._bodies(parser.push(delta.text)) if delta.text else []
        if delta.finish_reason is None:
            return bodies, None
        bodies += self._bodies(parser.finish())
        return bodies, self._plan.finish_reason(delta.finish_reason, saw_tool_calls=parser.saw_tool_calls)

    def _bodies(self, parsed: ParsedDelta) -> list[bytes]:
        members: dict[str, Any] = {}
        if parsed.reasoning and self._with_reasoning:
            members |= reasoning_members(parsed.reasoning)
        if parsed.content:
            members["content"] = parsed.content
        if parsed.tool_calls:
            members["tool_calls"] = [_tool_call(call) for call in parsed.tool_calls]
        return [b'"delta":' + to_json(members)] if members else []

    def _take_logprobs(self) -> Any:
        if not self._logprobs:
            return None
        taken, self._logprobs = self._logprobs, []
        return chat_logprobs(taken, self._num_top)

    def _take_extra(self, *, ends: bool) -> dict[str, Any] | None:
        extra: dict[str, Any] = {"stop_reason": self._stop_reason} if ends else {}
        if self._token_ids:
            extra["token_ids"], self._token_ids = self._token_ids, []
        return extra or None


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
