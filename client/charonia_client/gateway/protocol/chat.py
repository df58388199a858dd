"""Body of a chat completion request."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from charonia_client.gateway.protocol.sampling import MAX_LOGPROBS, SamplingFields

MAX_MESSAGES = 4096
MAX_TOOLS = 1024

FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")]


class ChatMessage(BaseModel):
    """One message; the model's chat template decides which further fields count."""

    model_config = ConfigDict(extra="allow")
    role: str = Field(min_length=1, max_length=64)
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class ChatFunction(BaseModel):
    """A function that the model may call. parameters: JSON schema of its arguments."""

    model_config = ConfigDict(extra="allow")
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: ChatFunction


class _ChosenFunction(BaseModel):
    name: FunctionName


class NamedToolChoice(BaseModel):
    """Call this very function."""

    type: Literal["function"] = "function"
    function: _ChosenFunction


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[ChatTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    include_reasoning: bool | None = True
    reasoning_effort: str | None = Field(None, max_length=32)

    @property
    def forced_function(self) -> str | None:
        """The function that must be called, where `tool_choice` names one."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None

    @property
    def forces_tools(self) -> bool:
        """Whether the answer must be tool calls."""
        return self.tool_choice == "required" or self.forced_function is not None

    @property
    def offers_tools(self) -> bool:
        """Whether the model is told of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def allows_parallel_calls(self) -> bool:
        """Whether one answer may call several functions."""
        return self.parallel_tool_calls is not False

    def tool_values(self) -> list[dict[str, Any]]:
        """The tools as plain JSON values, as they were sent."""
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]

    def template_kwargs(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    def chat_input(self) -> dict[str, Any]:
        """The model's input `messages`. Raises nothing: the model checks it."""
        chat: dict[str, Any] = {"messages": message_values(self.messages)}
        if self.offers_tools:
            chat["tools"] = self.tool_values()
        if kwargs := self.template_kwargs():
            chat["chat_template_kwargs"] = kwargs
        for name in ("add_generation_prompt", "continue_final_message"):
            value = getattr(self, name)
            if value is not None:
                chat[name] = value
        return chat


def message_values(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as plain JSON values, as chat templates know them.

    The role "developer" is the OpenAI API's newer name of "system"; "reasoning" is vLLM's of "reasoning_content".
    """
    values = [message.model_dump(exclude_unset=True) for message in messages]
    for value in values:
        if value["role"] == "developer":
            value["role"] = "system"
        if "reasoning" in value:
            value.setdefault("reasoning_content", value.pop("reasoning"))
    return values


def reasoning_members(reasoning: str) -> dict[str, str]:
    """The members of a message that tell its reasoning, by DeepSeek's name and by vLLM's."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}
