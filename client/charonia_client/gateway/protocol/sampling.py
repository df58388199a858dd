"""What chat and completion requests have in common, and the model's sampling parameters that they stand for.

Caps on values are the engine's: it knows them and names the field. Here are those that the gateway itself must
hold, because it loops over the value.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from charonia_client.gateway.errors import ApiError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_IDS = 1 << 19
MAX_BIASES = 1024

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

PASSED_ON = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "min_tokens", "stop", "stop_token_ids", "bad_words", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "priority",
    "cache_salt",
)  # fmt: skip
"""Fields that are sampling parameters of the model under the same name."""

REFUSED = (
    "use_beam_search", "truncate_prompt_tokens", "chat_template", "documents", "functions", "function_call",
)  # fmt: skip
"""Fields of OpenAI and vLLM that are not offered, and without which the answer would be another than was asked for."""

_GUIDED = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
}  # fmt: skip


class StreamOptions(BaseModel):
    """include_usage: a last chunk with token counts. continuous_usage_stats: counts so far in every chunk."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchemaFormat(BaseModel):
    """The schema of ``response_format: json_schema``."""

    model_config = ConfigDict(extra="allow")
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What form the answer must have."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class SamplingFields(BaseModel):
    """Fields of both kinds of generation."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=1024)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=MAX_BIASES)
    response_format: ResponseFormat | None = None
    user: str | None = None

    top_k: Int64 | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Int64 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    bad_words: list[str] | None = Field(None, max_length=256)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[TokenId] | None = Field(None, max_length=MAX_IDS, fail_fast=True)
    priority: Int64 | None = None
    cache_salt: str | None = Field(None, max_length=256)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = False
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, max_length=1024)
    guided_grammar: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """Whether every chunk of a stream has token counts."""
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    @property
    def num_choices(self) -> int:
        """Sequences for each prompt."""
        return self.n or 1

    def sampling_parameters(self) -> dict[str, Any]:
        """The parameters that go to the model as they are, without nulls. Raises `ApiError` for what it cannot do."""
        for name in REFUSED:
            if (self.model_extra or {}).get(name):
                raise ApiError(f"{name} is not supported", param=name)
        if self.prompt_logprobs is not None and self.streams:
            raise ApiError("prompt_logprobs is not for stream=true", param="prompt_logprobs")
        if self.stream_options is not None and not self.streams:
            raise ApiError("stream_options is only for stream=true", param="stream_options")
        given = {name: getattr(self, name) for name in PASSED_ON}
        parameters = {name: value for name, value in given.items() if value is not None}
        if self.prompt_logprobs is not None:
            parameters["prompt_logprobs"] = self.prompt_logprobs
        constraint = self.constraint()
        if constraint is not None:
            parameters["structured_outputs"] = constraint
        return parameters

    def constraint(self) -> Mapping[str, Any] | None:
        """The structure that the output must have, from whichever field states it. Raises `ApiError` for two."""
        found: list[tuple[str, Mapping[str, Any]]] = []
        if self.structured_outputs:
            found.append(("structured_outputs", self.structured_outputs))
        for field, kind in _GUIDED.items():
            value = getattr(self, field)
            if value is not None:
                found.append((field, {kind: value}))
        of_format = _format_constraint(self.response_format)
        if of_format is not None:
            found.append(("response_format", of_format))
        if len(found) > 1:
            raise ApiError(f"{found[0][0]} and {found[1][0]} exclude each other", param=found[1][0])
        return found[0][1] if found else None


def _format_constraint(wanted: ResponseFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None or wanted.json_schema.json_schema is None:
        raise ApiError(
            "response_format of type json_schema needs json_schema.schema",
            param="response_format.json_schema",
        )
    return {"json": wanted.json_schema.json_schema}
