"""Parsers that find reasoning and tool calls in generated text: pure text, one parser a sequence."""

from charonia_client.gateway.parsers.deltas import ParsedDelta, ToolCallDelta
from charonia_client.gateway.parsers.output_parser import OutputParser
from charonia_client.gateway.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    make_parser,
    needs_special_tokens,
    parse_required_tool_calls,
)

__all__ = [
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "OutputParser",
    "ParsedDelta",
    "ToolCallDelta",
    "make_parser",
    "needs_special_tokens",
    "parse_required_tool_calls",
]
