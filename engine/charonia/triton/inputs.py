"""From a Triton request to an engine request. Everything a client can get wrong ends in a typed error that names it."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from charonia.errors import InvalidRequestError, UnsupportedError
from charonia.sampling_params import SamplingParams
from charonia.serving.request import ChatInput, EmbeddingRequest, GenerationRequest
from charonia.triton.contract import (
    BOOLEAN_INPUTS,
    MAX_CACHE_SALT_CHARS,
    MAX_JSON_BYTES,
    MAX_PRIORITY,
    MAX_PROMPT_BYTES,
    OPTIONAL_OUTPUTS,
    RETURN_PREFIX,
)
from charonia.triton.embedding_inputs import check_alone, read_embedding_input
from charonia.triton.json_values import decode_json_object, without_nulls
from charonia.triton.pb import AnyArray, PbRequest
from charonia.triton.prompt_inputs import bytes_input, read_prompt
from charonia.triton.trace_headers import server_trace, take_trace_headers

ERROR_CODES_PARAMETER = "charonia_error_codes"
"""Request parameter that asks for error messages which begin with their code, as in "[INVALID_ARG] ...": Triton sends
the code of a model's error neither on a gRPC stream nor over HTTP."""

TRANSPORT_PARAMETERS = frozenset(
    {
        ERROR_CODES_PARAMETER,
        "binary_data_output", "classification", "id", "sequence_end", "sequence_id", "sequence_start",
        "triton_enable_empty_final_response", "triton_grpc_error",
    }
)  # fmt: skip
"""Request parameters of Triton's front doors: `/generate` passes on every top-level key that is no input."""

_OUTPUT_OF_FLAG = {RETURN_PREFIX + name: name for name in OPTIONAL_OUTPUTS}
_STREAM_ECHO_ERROR = (
    "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
)


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request's content, free of the stub: cheap to take, parsed later on another thread."""

    inputs: Mapping[str, AnyArray]
    parameters: str = "{}"
    request_id: str = ""
    timeout_us: int = 0
    arrival: float = field(default_factory=time.monotonic)
    trace_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def wants_error_codes(self) -> bool:
        """Whether error messages are to begin with their code; a parameter that is no boolean asks for nothing."""
        if ERROR_CODES_PARAMETER not in self.parameters:
            return False
        try:
            value = msgspec.json.decode(self.parameters).get(ERROR_CODES_PARAMETER)
        except (msgspec.DecodeError, AttributeError, RecursionError):
            return False
        return value is True or str(value).lower() == "true"

    @classmethod
    def take(cls, request: PbRequest, *, with_trace: bool = False) -> "RawRequest":
        """Copy out of the stub's shared memory. Raises `InvalidRequestError` where a string is not UTF-8.

        with_trace: also the server's own trace context, if it traces the request.
        """
        try:
            return cls(
                inputs={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
                parameters=request.parameters(),
                request_id=request.request_id(),
                timeout_us=request.timeout(),
                trace_headers=server_trace(request) if with_trace else {},
            )
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"a request parameter or the request id is not valid UTF-8: {error}"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """How a request wants to be answered.

    echo: prepend the prompt's text to every output. outputs: the optional outputs asked for. wants_logprobs: whether
    the sampling parameters ask for logprobs (else the output `logprobs`, when asked for, is "null").
    tokens_are_content: no text is generated, so a response counts as empty only if it has no tokens.
    """

    stream: bool = False
    echo: bool = False
    outputs: frozenset[str] = frozenset()
    wants_logprobs: bool = False
    tokens_are_content: bool = False


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A valid request: what to generate, or to embed, and how to answer."""

    generation: GenerationRequest | EmbeddingRequest
    options: ResponseOptions


def parse_request(raw: RawRequest, ignored_parameters: Collection[str] = ()) -> ParsedRequest:
    """Build the engine's request. Raises `InvalidRequestError` or `UnsupportedError`.

    The JSON object in `sampling_parameters` wins over request parameters of the same name; request parameters also
    stand in for absent boolean inputs. ignored_parameters: request parameters of other software on the way.
    """
    _refuse_unsupported(raw.inputs)
    settings = _request_parameters(raw.parameters, ignored_parameters)
    sent_trace_headers = take_trace_headers(settings) if settings else {}
    flags = _flags(raw.inputs, settings)
    if "sampling_parameters" in raw.inputs:
        text = bytes_input(raw.inputs, "sampling_parameters", MAX_JSON_BYTES)
        given = decode_json_object(text, "input 'sampling_parameters'") if text.strip() else {}
        settings.update(without_nulls(given))
    priority = _integer(settings.pop("priority", 0), "priority", -MAX_PRIORITY, MAX_PRIORITY)
    timeout_us = _integer(settings.pop("timeout", raw.timeout_us), "timeout", 0, 2**63 - 1)
    cache_salt = settings.pop("cache_salt", "")
    if not isinstance(cache_salt, str) or len(cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequestError(
            f"'cache_salt' must be a string of at most {MAX_CACHE_SALT_CHARS} characters"
        )
    common: dict[str, Any] = {
        "request_id": raw.request_id,
        "priority": priority,
        "timeout_s": timeout_us / 1e6 if timeout_us else None,
        "cache_salt": cache_salt,
        "arrival": raw.arrival,
        "trace_headers": raw.trace_headers or sent_trace_headers,
    }
    if "embedding_request" in raw.inputs:
        return _embedding(raw.inputs, settings, flags, common)
    params = SamplingParams.from_mapping(settings)
    prompt = read_prompt(raw.inputs)
    options = _response_options(flags, params, prompt)
    if "cumulative_logprob" in options.outputs and params.logprobs is None:
        # A running total needs the log-probability of each token taken, and of no others.
        params = msgspec.structs.replace(params, logprobs=0)
    return ParsedRequest(
        GenerationRequest(prompt=prompt, params=params, stream=options.stream, **common), options
    )


def _request_parameters(text: str, ignored: Collection[str]) -> dict[str, Any]:
    """Those that are for the model."""
    if text in ("", "{}"):
        return {}
    parameters = decode_json_object(text.encode(), "the request parameters")
    return {
        name: value
        for name, value in parameters.items()
        if value is not None and name not in TRANSPORT_PARAMETERS and name not in ignored
    }


def _flags(inputs: Mapping[str, AnyArray], settings: dict[str, Any]) -> dict[str, bool]:
    """The booleans that are given, as inputs or, taken out of `settings`, as request parameters."""
    flags = {}
    for name in BOOLEAN_INPUTS.intersection(settings):
        value = settings.pop(name)
        if name not in inputs:
            flags[name] = _flag_parameter(value, name)
    for name in BOOLEAN_INPUTS.intersection(inputs):
        flags[name] = _flag(inputs[name], name)
    return flags


def _embedding(
    inputs: Mapping[str, AnyArray], settings: Mapping[str, Any], flags: Mapping[str, bool],
    common: Mapping[str, Any],
) -> ParsedRequest:  # fmt: skip
    """A request for an embedding; it is answered by one response, streaming or not."""
    text = bytes_input(inputs, "text_input", MAX_PROMPT_BYTES) if "text_input" in inputs else b""
    outputs = _outputs_asked(flags)
    check_alone(inputs, text, settings, outputs)
    given = read_embedding_input(bytes_input(inputs, "embedding_request", MAX_JSON_BYTES))
    request = EmbeddingRequest(prompt=given.prompt, params=given.params, **common)
    return ParsedRequest(request, ResponseOptions(outputs=outputs))


def _outputs_asked(flags: Mapping[str, bool]) -> frozenset[str]:
    return frozenset(
        [_OUTPUT_OF_FLAG[name] for name, asked in flags.items() if asked and name in _OUTPUT_OF_FLAG]
    )


def _refuse_unsupported(inputs: Mapping[str, AnyArray]) -> None:
    if "image" in inputs:
        raise UnsupportedError("input 'image' is not supported: this model takes text only")


def _response_options(
    flags: Mapping[str, bool], params: SamplingParams, prompt: str | list[int] | ChatInput
) -> ResponseOptions:
    stream, exclude_input = flags.get("stream", False), flags.get("exclude_input_in_output")
    if stream and exclude_input is False:
        raise InvalidRequestError(_STREAM_ECHO_ERROR)
    if exclude_input is False and isinstance(prompt, list):
        raise InvalidRequestError(
            "'exclude_input_in_output' cannot be false with 'input_ids': there is no text to echo"
        )
    if exclude_input is None:
        exclude_input = not isinstance(prompt, str)
    return ResponseOptions(
        stream=stream,
        echo=not stream and not exclude_input,
        outputs=_outputs_asked(flags),
        wants_logprobs=params.logprobs is not None,
        tokens_are_content=not params.detokenize,
    )


def _flag(array: AnyArray, name: str) -> bool:
    """A boolean input."""
    if array.size != 1 or array.dtype.char != "?":
        raise InvalidRequestError(
            f"input {name!r} must be one BOOL, got {array.dtype} of shape {list(array.shape)}"
        )
    return bool(array.item())


def _flag_parameter(value: object, name: str) -> bool:
    """The request parameter that stands for a boolean input."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise InvalidRequestError(f"request parameter {name!r} must be a boolean, got {str(value)[:80]!r}")


def _integer(value: object, name: str, low: int, high: int) -> int:
    """An integer that may come as text, or as a float that is whole."""
    if type(value) is int:
        number = value
    else:
        try:
            number = msgspec.convert(value, int, strict=False)
        except (msgspec.ValidationError, OverflowError):
            raise InvalidRequestError(f"{name!r} must be an integer, got {str(value)[:80]!r}") from None
    if not low <= number <= high:
        raise InvalidRequestError(f"{name!r} must be from {low} to {high}, got {number}")
    return number


def parse_utility(raw: RawRequest) -> dict[str, Any] | None:
    """What a `utility_request` asks; None for other requests. Raises `InvalidRequestError`."""
    if "utility_request" not in raw.inputs:
        return None
    text = bytes_input(raw.inputs, "utility_request", MAX_PROMPT_BYTES)
    return decode_json_object(text, "input 'utility_request'")
