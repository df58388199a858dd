"""Text completions: one request to the model for each prompt, whole or as one stream."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json as to_json_bytes

from charonia_client.gateway.chat import UNLIMITED_TOKENS
from charonia_client.gateway.chunks import ChunkWriter
from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.generation import Generation, SequenceDelta, TokenCounts
from charonia_client.gateway.logprobs import CompletionLogprobs
from charonia_client.gateway.merge import MAX_CONCURRENT, merged
from charonia_client.gateway.outputs import output_flags
from charonia_client.gateway.protocol import CompletionRequest
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.sse import DONE
from charonia_client.gateway.triton_model import TritonModel, checked_text, to_json
from charonia_client.requests import GenerateRequest, InputValue

MAX_SEQUENCES = 4096
"""Choices of one answer: prompts times n."""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One prompt. echo: the text in front of each of its choices. token_ids: to be reported, if asked for."""

    generate: GenerateRequest
    echo: str
    token_ids: list[int] | None


async def plan_completion(
    request: CompletionRequest, settings: GatewaySettings, model: TritonModel, context: RequestContext
) -> list[PromptPlan]:
    """What to send for each prompt. Raises `ApiError`."""
    request.check()
    parameters = request.sampling_parameters()
    parameters["max_tokens"] = UNLIMITED_TOKENS if request.max_tokens is None else request.max_tokens
    if request.logprobs is not None:
        parameters["logprobs"] = request.logprobs
    flags: dict[str, InputValue] = {
        "stream": request.streams,
        "exclude_input_in_output": True,
        "sampling_parameters": to_json(parameters, "the sampling parameters"),
        **output_flags(
            request,
            wants_logprobs=request.logprobs is not None,
            tokens_details=settings.prompt_tokens_details,
        ),
    }
    prompts = request.prompts()
    request.check_choices(len(prompts), MAX_SEQUENCES)
    subjects = [_subject(prompt) for prompt in prompts]
    echoes = [await _echo(request, model, prompt, context) for prompt in prompts]
    ids = [await _token_ids(request, model, prompt, context) for prompt in prompts]
    several = len(prompts) > 1
    return [
        PromptPlan(
            model.request({**subject, **flags}, context, part=number if several else None),
            echoes[number],
            ids[number],
        )
        for number, subject in enumerate(subjects)
    ]


def _subject(prompt: str | list[int]) -> Mapping[str, InputValue]:
    if isinstance(prompt, str):
        return {"text_input": checked_text(prompt, "prompt")}
    return {"input_ids": tuple(prompt)}


async def _echo(
    request: CompletionRequest, model: TritonModel, prompt: str | list[int], context: RequestContext
) -> str:
    if not request.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    values = await model.utility("detokenize", {"tokens": prompt}, context)
    return str(values["prompt"])


async def _token_ids(
    request: CompletionRequest, model: TritonModel, prompt: str | list[int], context: RequestContext
) -> list[int] | None:
    if not request.return_token_ids:
        return None
    if not isinstance(prompt, str):
        return prompt
    values = await model.utility("tokenize", {"prompt": prompt}, context)
    return list(values["tokens"])


async def answer_completion(
    model: TritonModel, request: CompletionRequest, plans: Sequence[PromptPlan]
) -> tuple[list[dict[str, Any]], TokenCounts]:
    """The choices, prompt by prompt, and the counts of all."""
    tasks: list[asyncio.Task[tuple[list[dict[str, Any]], TokenCounts]]] = []
    room = asyncio.Semaphore(MAX_CONCURRENT)
    try:
        async with asyncio.TaskGroup() as group:
            for number, plan in enumerate(plans):
                tasks.append(group.create_task(_answer_one(model, request, plan, number, room)))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    counts = TokenCounts()
    for task in tasks:
        counts += task.result()[1]
    return [choice for task in tasks for choice in task.result()[0]], counts


async def _answer_one(
    model: TritonModel, request: CompletionRequest, plan: PromptPlan, number: int, room: asyncio.Semaphore
) -> tuple[list[dict[str, Any]], TokenCounts]:
    generation = Generation(model, plan.generate, request.num_choices)
    choices: list[dict[str, Any]] = []
    async with room, aclosing(generation.deltas()) as responses:
        async for deltas in responses:
            choices += [_choice(request, plan, delta, number) for delta in deltas]
    return choices, generation.counts


def _choice(
    request: CompletionRequest, plan: PromptPlan, delta: SequenceDelta, number: int
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": number * request.num_choices + delta.index,
        "text": plan.echo + delta.text,
        "logprobs": None,
        "finish_reason": delta.finish_reason or "stop",
    }
    if delta.logprobs is not None:
        choice["logprobs"] = CompletionLogprobs(len(plan.echo)).piece(delta.logprobs)
    if request.return_token_ids:
        choice |= {"token_ids": list(delta.token_ids or ()), "prompt_token_ids": plan.token_ids}
    return choice


async def stream_completion(
    model: TritonModel, request: CompletionRequest, plans: Sequence[PromptPlan], writer: ChunkWriter
) -> AsyncGenerator[bytes, None]:
    """The events of the answer. Choices of all prompts come as they are made, told apart by their index."""
    generations = [Generation(model, plan.generate, request.num_choices) for plan in plans]
    streams = [[_ChoiceStream(request, plan) for _ in range(request.num_choices)] for plan in plans]

    def counted() -> TokenCounts:
        return sum((generation.counts for generation in generations), TokenCounts())

    async with aclosing(merged([generation.deltas() for generation in generations])) as responses:
        async for number, deltas in responses:
            counts = counted() if request.has_continuous_usage else None
            events = []
            for delta in deltas:
                body, logprobs, extra = streams[number][delta.index].piece(delta)
                index = number * request.num_choices + delta.index
                events.append(
                    writer.chunk(index, body, delta.finish_reason, logprobs, extra=extra, counts=counts)
                )
            yield b"".join(events)
    yield writer.usage(counted()) + DONE if request.includes_usage else DONE


class _ChoiceStream:
    """What one choice remembers between its chunks."""

    def __init__(self, request: CompletionRequest, plan: PromptPlan) -> None:
        self._request = request
        self._prompt_token_ids = plan.token_ids
        self._echo = plan.echo
        self._logprobs = CompletionLogprobs(len(plan.echo))

    def piece(self, delta: SequenceDelta) -> tuple[bytes, Any, dict[str, Any] | None]:
        """The member `text`, the logprobs and further members of the next chunk."""
        text, self._echo = self._echo + delta.text, ""
        logprobs = self._logprobs.piece(delta.logprobs) if delta.logprobs is not None else None
        extra: dict[str, Any] | None = None
        if self._request.return_token_ids:
            extra = {"token_ids": list(delta.token_ids or ())}
            if self._prompt_token_ids is not None:
                extra["prompt_token_ids"], self._prompt_token_ids = self._prompt_token_ids, None
        return b'"text":' + to_json_bytes(text), logprobs, extra
