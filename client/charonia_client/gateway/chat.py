"""From a chat completion request to what the model is asked for, and how its answer is to be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.errors import ApiError
from charonia_client.gateway.output_formats import OutputFormats, output_formats
from charonia_client.gateway.outputs import output_flags
from charonia_client.gateway.parsers import (
    OutputParser,
    make_parser,
    needs_special_tokens,
    parse_required_tool_calls,
)
from charonia_client.gateway.protocol import ChatRequest
from charonia_client.gateway.sampling_defaults import recommended_sampling
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.tool_schema import named_tool_schema, required_tools_schema
from charonia_client.gateway.triton_model import TritonModel, to_json
from charonia_client.requests import GenerateRequest

UNLIMITED_TOKENS = 2**31 - 1
"""As `max_tokens`: up to the model's context length."""

Reading = Literal["plain", "parsed", "required", "named"]


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What to send, and how to read each sequence of the answer.

    reading: "plain" text; "parsed" for reasoning and tool calls; "required" and "named" where a grammar made tool
    calls. prompt: the input `messages`.
    """

    generate: GenerateRequest
    prompt: Mapping[str, Any]
    request: ChatRequest
    formats: OutputFormats
    reading: Reading

    def parser(self) -> OutputParser | None:
        """A parser for one sequence; None where its text is the content as it stands."""
        formats = self.formats
        if self.reading == "plain":
            return None
        if self.reading in ("required", "named"):
            return parse_required_tool_calls(
                name=self.request.forced_function, tool_parser=formats.tool_parser
            )
        return make_parser(
            tool_parser=formats.tool_parser if self.request.offers_tools else None,
            reasoning_parser=formats.reasoning_parser,
            tools=self.request.tool_values() if self.request.offers_tools else [],
            parallel_tool_calls=self.request.allows_parallel_calls,
            prompt_opens_reasoning=formats.opens_reasoning,
        )

    def finish_reason(self, reason: str, *, saw_tool_calls: bool) -> str:
        """The reason to report. A sequence that called a named function "stop"s, as with OpenAI."""
        calls = saw_tool_calls and reason == "stop" and self.reading != "named"
        return "tool_calls" if calls else reason


async def plan_chat(
    request: ChatRequest, settings: GatewaySettings, model: TritonModel, context: RequestContext
) -> ChatPlan:
    """Raises `ApiError` for what the request must not combine."""
    given = request.sampling_parameters()
    parameters = await recommended_sampling(settings, model, context) | given
    limit = request.max_completion_tokens or request.max_tokens
    parameters["max_tokens"] = limit or parameters.get("max_tokens", UNLIMITED_TOKENS)
    _add_logprobs(request, parameters)
    formats = await output_formats(settings, model, request, context)
    reading = _reading(request, formats, constrained="structured_outputs" in parameters)
    if reading == "named":
        schema = named_tool_schema(request.tools or (), request.forced_function or "")
        parameters["structured_outputs"] = {"json": schema}
    elif reading == "required":
        schema = required_tools_schema(request.tools or (), parallel=request.allows_parallel_calls)
        parameters["structured_outputs"] = {"json": schema}
    elif reading == "parsed" and needs_special_tokens(
        formats.tool_parser if request.offers_tools else None, formats.reasoning_parser
    ):
        parameters.setdefault("skip_special_tokens", False)
    prompt = request.chat_input()
    inputs = {
        "messages": to_json(prompt, "messages"),
        "stream": request.streams,
        "exclude_input_in_output": True,
        "sampling_parameters": to_json(parameters, "the sampling parameters"),
        **output_flags(request, parameters, tokens_details=settings.prompt_tokens_details),
    }
    return ChatPlan(model.request(inputs, context), prompt, request, formats, reading)


def _add_logprobs(request: ChatRequest, parameters: dict[str, Any]) -> None:
    if request.logprobs:
        parameters["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs:
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")


def _reading(request: ChatRequest, formats: OutputFormats, *, constrained: bool) -> Reading:
    if request.forced_function is not None:
        return "named"
    if request.forces_tools:
        return "required"
    if request.offers_tools and formats.tool_parser is None:
        raise ApiError(
            "tool_choice 'auto' needs a tool parser, and this server has none", param="tool_choice"
        )
    if constrained:
        # The grammar holds from the first token on: there is neither reasoning nor any mark of a call.
        return "plain"
    return "parsed" if request.offers_tools or formats.reasoning_parser else "plain"
