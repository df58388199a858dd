"""Text completions: one request to the model for each prompt, whole or as one stream."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json as to_json_bytes

from charonia_client.gateway.chat import UNLIMITED_TOKENS
from charonia_client.gateway.chunks import ChunkWriter
from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.echo import PromptEcho, prompt_echoes
from charonia_client.gateway.generation import Generation, SequenceDelta, TokenCounts
from charonia_client.gateway.logprobs import CompletionLogprobs, trimmed
from charonia_client.gateway.merge import merged, results
from charonia_client.gateway.outputs import output_flags
from charonia_client.gateway.protocol import CompletionRequest
from charonia_client.gateway.sampling_defaults import recommended_sampling
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.sse import DONE
from charonia_client.gateway.triton_model import TritonModel, checked_text, to_json
from charonia_client.requests import GenerateRequest, InputValue

MAX_SEQUENCES = 4096
"""Choices of one answer: prompts times n."""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One prompt: what to send, and what the answer tells of it."""

    generate: GenerateRequest
    echo: PromptEcho


async def plan_completion(
    request: CompletionRequest, settings: GatewaySettings, model: TritonModel, context: RequestContext
) -> list[PromptPlan]:
    """What to send for each prompt. Raises `ApiError`."""
    request.check()
    parameters = _parameters(request, await recommended_sampling(settings, model, context))
    flags: dict[str, InputValue] = {
        "stream": request.streams,
        "exclude_input_in_output": True,
        "sampling_parameters": to_json(parameters, "the sampling parameters"),
        **output_flags(request, parameters, tokens_details=settings.prompt_tokens_details),
    }
    prompts = request.prompts()
    request.check_choices(len(prompts), MAX_SEQUENCES)
    subjects = [_subject(prompt) for prompt in prompts]
    echoes = await prompt_echoes(request, model, prompts, context)
    several = len(prompts) > 1
    return [
        PromptPlan(
            model.request({**subject, **flags}, context, part=number if several else None), echoes[number]
        )
        for number, subject in enumerate(subjects)
    ]


def _parameters(request: CompletionRequest, recommended: dict[str, Any]) -> dict[str, Any]:
    parameters = {"max_tokens": UNLIMITED_TOKENS} | recommended | request.sampling_parameters()
    if request.max_tokens is not None:
        parameters["max_tokens"] = request.max_tokens
    if request.logprobs is not None:
        parameters["logprobs"] = request.logprobs
        if request.echo:
            parameters["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    if not request.generates:
        # The model cannot but generate: its one token is left out of the answer.
        parameters["max_tokens"] = 1
        parameters.pop("logprobs", None)
        parameters.pop("min_tokens", None)
    return parameters


def _subject(prompt: str | list[int]) -> Mapping[str, InputValue]:
    if isinstance(prompt, str):
        return {"text_input": checked_text(prompt, "prompt")}
    return {"input_ids": tuple(prompt)}


async def answer_completion(
    model: TritonModel, request: CompletionRequest, plans: Sequence[PromptPlan]
) -> tuple[list[dict[str, Any]], TokenCounts]:
    """The choices, prompt by prompt, and the counts of all."""

    async def answer(number: int) -> tuple[list[dict[str, Any]], TokenCounts]:
        generation = _generation(model, request, plans[number])
        choices: list[dict[str, Any]] = []
        async with aclosing(generation.deltas()) as responses:
            async for deltas in responses:
                choices += [_choice(request, plans[number], delta, number, generation) for delta in deltas]
        return choices, generation.counts

    answers = await results(answer, range(len(plans)))
    counts = sum((counts for _, counts in answers), TokenCounts())
    return [choice for choices, _ in answers for choice in choices], counts


def _generation(model: TritonModel, request: CompletionRequest, plan: PromptPlan) -> Generation:
    return Generation(model, plan.generate, request.num_choices, prompt_only=not request.generates)


def _choice(
    request: CompletionRequest, plan: PromptPlan, delta: SequenceDelta, number: int, generation: Generation
) -> dict[str, Any]:
    pieces = _ChoicePieces(request, plan)
    choice: dict[str, Any] = {
        "index": number * request.num_choices + delta.index,
        "text": plan.echo.text + delta.text,
        "logprobs": pieces.logprobs(delta, generation),
        "finish_reason": delta.finish_reason or "stop",
        "stop_reason": delta.stop_reason,
    }
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = trimmed(generation.prompt_logprobs or (), request.prompt_logprobs)
    if request.return_token_ids:
        choice |= {"token_ids": list(delta.token_ids or ()), "prompt_token_ids": plan.echo.token_ids}
    return choice


async def stream_completion(
    model: TritonModel, request: CompletionRequest, plans: Sequence[PromptPlan], writer: ChunkWriter
) -> AsyncGenerator[bytes, None]:
    """The events of the answer. Choices of all prompts come as they are made, told apart by their index."""
    generations = [_generation(model, request, plan) for plan in plans]
    streams = [[_ChoicePieces(request, plan) for _ in range(request.num_choices)] for plan in plans]

    def counted() -> TokenCounts:
        return sum((generation.counts for generation in generations), TokenCounts())

    async with aclosing(merged([generation.deltas() for generation in generations])) as responses:
        async for number, deltas in responses:
            events = []
            for delta in deltas:
                counts = None
                if request.has_continuous_usage:
                    counts = delta.counts if len(plans) == 1 else counted()
                body, logprobs, extra = streams[number][delta.index].piece(delta, generations[number])
                index = number * request.num_choices + delta.index
                events.append(
                    writer.chunk(index, body, delta.finish_reason, logprobs, extra=extra, counts=counts)
                )
            yield b"".join(events)
    yield writer.usage(counted()) + DONE if request.includes_usage else DONE


class _ChoicePieces:
    """What one choice remembers between its chunks."""

    def __init__(self, request: CompletionRequest, plan: PromptPlan) -> None:
        self._request = request
        self._prompt_token_ids = plan.echo.token_ids
        self._echo = plan.echo.text
        self._scores_prompt = request.scores_prompt
        self._logprobs = CompletionLogprobs(request.logprobs or 0, plan.echo.first_token)

    def piece(self, delta: SequenceDelta, generation: Generation) -> tuple[bytes, Any, dict[str, Any] | None]:
        """The member `text`, the logprobs and further members of the next chunk."""
        logprobs = self.logprobs(delta, generation)
        text, self._echo = self._echo + delta.text, ""
        extra: dict[str, Any] | None = None
        if delta.finish_reason is not None:
            extra = {"stop_reason": delta.stop_reason}
        if self._request.return_token_ids:
            extra = {**(extra or {}), "token_ids": list(delta.token_ids or ())}
            if self._prompt_token_ids is not None:
                extra["prompt_token_ids"], self._prompt_token_ids = self._prompt_token_ids, None
        return b'"text":' + to_json_bytes(text), logprobs, extra

    def logprobs(self, delta: SequenceDelta, generation: Generation) -> dict[str, Any] | None:
        """Those of the delta; in the first piece of a choice that echoes, with those of the prompt in front."""
        if self._request.logprobs is None:
            return None
        positions = [*(generation.prompt_logprobs or ())] if self._scores_prompt else []
        self._scores_prompt = False
        positions += delta.logprobs or ()
        return self._logprobs.piece(self._echo + delta.text, positions)
