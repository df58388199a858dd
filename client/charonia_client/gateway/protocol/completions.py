"""Body of a completion request."""

from typing import Annotated

from pydantic import Field

from charonia_client.gateway.errors import ApiError
from charonia_client.gateway.protocol.sampling import MAX_LOGPROBS, SamplingFields, TokenId

MAX_PROMPTS = 1024
MAX_PROMPT_TOKENS = 1 << 21

# Long lists are left at their first fault: a list of as many faults would hold up all requests for seconds.
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the echoed prompt are asked for."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def generates(self) -> bool:
        """Whether anything is to follow the prompt."""
        return self.max_tokens != 0

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one, all texts or all token ids."""
        return as_prompts(self.prompt)

    def check(self) -> None:
        """Raise `ApiError` for what is well-formed and not offered."""
        if self.suffix:
            raise ApiError("suffix is not supported", param="suffix")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ApiError("best_of is not supported; use n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens must be at least 1, except with echo", param="max_tokens")

    def check_choices(self, num_prompts: int, limit: int) -> None:
        """Raise `ApiError` for more than `limit` choices in all."""
        if num_prompts * self.num_choices > limit:
            raise ApiError(f"at most {limit} choices are made in one request (prompts times n)", param="n")


def as_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """One prompt or several, as several. Raises `ApiError` for an empty list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError("the prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt
