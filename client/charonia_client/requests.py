"""From a caller's keywords to the model's inputs, independent of the protocol."""

import json
import operator
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, TypedDict

from charonia_client.errors import InvalidRequestError

DEFAULT_MODEL = "llm"
MAX_TIMEOUT_S = 1e9

InputValue = str | bool | tuple[int, ...]
"""A model input: STRING [1], BOOL [1] or INT32 [-1]."""

Message = Mapping[str, Any]
"""A chat message: ``role``, ``content`` and whatever else the model's chat template reads."""


class SamplingKeywords(TypedDict, total=False):
    """Sampling parameters as keywords; the server knows their meaning and defaults, and checks them."""

    n: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    bad_words: Sequence[str]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    detokenize: bool
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    logprobs: int
    prompt_logprobs: int
    priority: int
    cache_salt: str


class RequestOptions(SamplingKeywords, total=False):
    """Keywords of `generate`, `stream` and `chat`.

    sampling_params: sampling parameters as a mapping, for those without a keyword; keywords win.
    model, model_version: which model of the server; its newest version by default.
    timeout: seconds until the request is cancelled and `RequestTimeoutError` raised; None waits for ever.
    request_id: appears in the server's log and traces, and in the results; unique among the requests in
    flight.
    echo: put the prompt in front of the text (not when streaming).
    return_token_ids, return_timings, return_cumulative_logprob, return_stop_reason: fill these fields of the results.
    Log-probabilities are returned when the sampling parameters ask for ``logprobs`` or ``prompt_logprobs``.
    """

    sampling_params: Mapping[str, Any]
    model: str
    model_version: str
    timeout: float | None
    request_id: str
    echo: bool
    return_token_ids: bool
    return_timings: bool
    return_cumulative_logprob: bool
    return_stop_reason: bool


class ChatOptions(RequestOptions, total=False):
    """Keywords of `chat`: those of `generate`, and what else the chat template takes.

    continue_final_message: the answer continues the last message instead of following it.
    """

    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool


_CHAT_KEYS = frozenset(ChatOptions.__annotations__) - frozenset(RequestOptions.__annotations__)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request ready for any transport. stream: whether the model answers once or token by token.

    timeout: in seconds; the server is told it too, and ends by itself what no cancellation may reach.
    parameters: Triton request parameters, over gRPC alone.
    """

    model: str
    model_version: str
    request_id: str
    inputs: Mapping[str, InputValue]
    stream: bool
    timeout: float | None
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def timeout_us(self) -> int | None:
        """The time limit in microseconds, as Triton counts it."""
        return None if self.timeout is None else max(1, round(self.timeout * 1e6))


def text_request(
    prompt: str | None,
    token_ids: Sequence[SupportsIndex] | None,
    options: RequestOptions,
    *,
    stream: bool,
    url: str,
) -> GenerateRequest:
    """Continue a text or token ids, exactly one of them. Raises `InvalidRequestError` that names the wrong
    argument.
    """
    model = options.get("model", DEFAULT_MODEL)
    if (prompt is None) == (token_ids is None):
        raise InvalidRequestError("give either prompt or token_ids", url=url, model=model)
    if token_ids is not None:
        subject: tuple[str, InputValue] = ("input_ids", _checked_token_ids(token_ids, url, model))
    else:
        subject = ("text_input", _checked_text(prompt, url, model))
    return _request(*subject, dict(options), stream=stream, url=url)


def chat_request(
    messages: Sequence[Message], options: ChatOptions, *, stream: bool, url: str
) -> GenerateRequest:
    """Answer a conversation. Raises `InvalidRequestError` if the messages are not JSON."""
    rest: dict[str, Any] = dict(options)
    model = options.get("model", DEFAULT_MODEL)
    body = {name: rest.pop(name) for name in _CHAT_KEYS & rest.keys()}
    body["messages"] = list(messages)
    return _request("messages", _json("messages", body, url, model), rest, stream=stream, url=url)


def _request(
    name: str, value: InputValue, rest: dict[str, Any], *, stream: bool, url: str
) -> GenerateRequest:
    """Split what is left of the keywords into the client's own and the sampling parameters, which are all
    others.
    """
    model = rest.pop("model", DEFAULT_MODEL)
    version = rest.pop("model_version", "")
    timeout = rest.pop("timeout", None)
    request_id = rest.pop("request_id", "") or uuid.uuid4().hex
    if timeout is not None and not 0 < timeout < MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"timeout must be a positive number of seconds, got {timeout!r}", url=url, model=model
        )
    inputs: dict[str, InputValue] = {
        name: value,
        "stream": stream,
        "exclude_input_in_output": not rest.pop("echo", False),
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    for flag in ("return_token_ids", "return_timings", "return_cumulative_logprob", "return_stop_reason"):
        if rest.pop(flag, False):
            inputs[flag] = True
    sampling = {**(rest.pop("sampling_params", None) or {}), **rest}
    for name in ("logprobs", "prompt_logprobs"):
        if sampling.get(name) is not None:
            inputs[f"return_{name}"] = True
    if sampling:
        inputs["sampling_parameters"] = _json("sampling parameters", sampling, url, model)
    return GenerateRequest(model, version, request_id, inputs, stream, timeout)


def _json(what: str, value: object, url: str, model: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{what} must be JSON: {error}", url=url, model=model) from None


def _checked_text(prompt: object, url: str, model: str) -> str:
    if not isinstance(prompt, str):
        raise InvalidRequestError(
            f"prompt must be a string, got {type(prompt).__name__}", url=url, model=model
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"prompt is not valid Unicode: {error}", url=url, model=model) from None
    return prompt


def _checked_token_ids(token_ids: Sequence[SupportsIndex], url: str, model: str) -> tuple[int, ...]:
    try:
        checked = tuple(map(operator.index, token_ids))
    except TypeError as error:
        raise InvalidRequestError(
            f"token_ids must be a list of integers: {error}", url=url, model=model
        ) from None
    for token_id in checked:
        if not 0 <= token_id < 2**31:
            raise InvalidRequestError(
                f"token_ids must be 31-bit token ids, got {token_id}", url=url, model=model
            )
    return checked
