"""Bodies of the requests, as the OpenAI API and vLLM define them. Fields that nobody knows are ignored."""

from charonia_client.gateway.protocol.chat import (
    ChatRequest,
    ChatTool,
    NamedToolChoice,
    message_values,
    reasoning_members,
)
from charonia_client.gateway.protocol.completions import CompletionRequest
from charonia_client.gateway.protocol.embeddings import EmbeddingRequest
from charonia_client.gateway.protocol.sampling import MAX_N, SamplingFields
from charonia_client.gateway.protocol.tokens import DetokenizeRequest, TokenizeRequest

__all__ = [
    "MAX_N",
    "ChatRequest",
    "ChatTool",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "NamedToolChoice",
    "SamplingFields",
    "TokenizeRequest",
    "message_values",
    "reasoning_members",
]
