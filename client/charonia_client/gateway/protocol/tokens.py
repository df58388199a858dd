"""Bodies of tokenising requests, in vLLM's form."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charonia_client.gateway.protocol.chat import MAX_MESSAGES, MAX_TOOLS, ChatMessage, ChatTool
from charonia_client.gateway.protocol.completions import MAX_PROMPT_TOKENS
from charonia_client.gateway.protocol.sampling import TokenId


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: a text (`prompt`) or a chat (`messages`).

    add_special_tokens: whether the tokenizer adds its own; by default for a text, not for a chat.
    """

    model_config = ConfigDict(extra="allow")
    model: str | None = Field(None, max_length=1024)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ChatTool] | None = Field(None, max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _one_subject(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(extra="allow")
    model: str | None = Field(None, max_length=1024)
    tokens: list[TokenId] = Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)
