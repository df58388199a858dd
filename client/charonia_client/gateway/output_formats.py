"""Which parsers read a model's output: those that the settings name, or those that its chat template asks for."""

from dataclasses import dataclass

from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.parsers import REASONING_PARSERS, TOOL_PARSERS
from charonia_client.gateway.protocol import ChatRequest
from charonia_client.gateway.settings import AUTO, GatewaySettings
from charonia_client.gateway.triton_model import TritonModel

_TOOL_MARKS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name and its value', "llama3_json"),  # Llama 3.2 has no tag
)
"""What a chat template says of tool calls, and the parser for it; the first mark found counts."""
_DEFAULT_TOOL_PARSER = "hermes"
"""For templates that say nothing: models tuned on tool calls mostly use this form, and others never write its mark."""
_REASONING_MARKS = (("[THINK]", "mistral"), ("</think>", "qwen3"))


@dataclass(frozen=True, slots=True)
class OutputFormats:
    """Names of the parsers for one request. opens_reasoning: the prompt ends inside the reasoning."""

    tool_parser: str | None
    reasoning_parser: str | None
    opens_reasoning: bool = False


def check_parser_names(settings: GatewaySettings) -> None:
    """Raise ValueError unless the settings name parsers that exist."""
    for flag, name, known in (
        ("tool parser", settings.tool_parser, TOOL_PARSERS),
        ("reasoning parser", settings.reasoning_parser, REASONING_PARSERS),
    ):
        if name is not None and name != AUTO and name not in known:
            raise ValueError(f"there is no {flag} {name!r}; known are {AUTO}, {', '.join(known)}")


def tool_parser_for(chat_template: str | None) -> str:
    """The parser of tool calls that a chat template asks for."""
    found = (name for mark, name in _TOOL_MARKS if chat_template and mark in chat_template)
    return next(found, _DEFAULT_TOOL_PARSER)


def reasoning_parser_for(chat_template: str | None) -> str | None:
    """The parser of reasoning that a chat template asks for; None where it knows of none."""
    return next((name for mark, name in _REASONING_MARKS if chat_template and mark in chat_template), None)


async def output_formats(
    settings: GatewaySettings, model: TritonModel, request: ChatRequest, context: RequestContext
) -> OutputFormats:
    """The parsers for one request."""
    tools, reasoning = settings.tool_parser, settings.reasoning_parser
    if AUTO in (tools, reasoning):
        template = (await model.info(context)).chat_template
        tools = tool_parser_for(template) if tools == AUTO else tools
        reasoning = reasoning_parser_for(template) if reasoning == AUTO else reasoning
    opens = False
    if reasoning is not None and request.add_generation_prompt is not False:
        end = await model.prompt_end(request.template_kwargs(), context)
        opens = end.rstrip().endswith(REASONING_PARSERS[reasoning].opening)
    return OutputFormats(tools, reasoning, opens)
