"""Questions about a model that its frontend answers by itself, without the engine: tokens and texts, its limits.

Gateways have no tokenizer; this is how they ask for one. The request is a JSON object with one key.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from charonia.errors import InvalidRequestError
from charonia.serving.input_processor import InputProcessor
from charonia.text.chat import render_chat

MAX_TOKENS = 1 << 21

T = TypeVar("T")


class Tokenize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text or a chat to tokenise. add_special_tokens: by default for a text, not for a chat.

    return_token_strs: the tokens as the vocabulary spells them. return_token_texts: as log-probabilities show them.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    return_token_texts: bool = False


class Detokenize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token ids to turn into text, special tokens spelt out. return_token_texts: also each token by itself."""

    tokens: list[int]
    return_token_texts: bool = False


class AskModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model is."""


def answer_utility(inputs: InputProcessor, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a decoded `utility_request`. May compute for seconds. Raises `InvalidRequestError`."""
    if len(request) != 1:
        raise InvalidRequestError("input 'utility_request' must have exactly one key")
    ((kind, body),) = request.items()
    match kind:
        case "tokenize":
            return _tokenize(inputs, _convert(body, Tokenize, kind))
        case "detokenize":
            return _detokenize(inputs, _convert(body, Detokenize, kind))
        case "model_info":
            _convert(body, AskModel, kind)
            return _model_info(inputs)
    raise InvalidRequestError(
        f"input 'utility_request': unknown key {kind[:40]!r}; known keys: detokenize, model_info, tokenize"
    )


def _convert(body: object, kind: type[T], name: str) -> T:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"input 'utility_request': {name}: {error}") from None


def _tokenize(inputs: InputProcessor, asked: Tokenize) -> dict[str, Any]:
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequestError("input 'utility_request': tokenize needs either prompt or messages")
    tokenizer = inputs.tokenizer
    if asked.messages is not None:
        text = render_chat(
            tokenizer,
            asked.messages,
            tools=asked.tools,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            chat_template_kwargs=asked.chat_template_kwargs,
        )
    else:
        text = asked.prompt or ""
    inputs.check_text_length(text)
    special = asked.messages is None if asked.add_special_tokens is None else asked.add_special_tokens
    token_ids = tokenizer.encode(text, add_special_tokens=special)
    answer: dict[str, Any] = {"tokens": token_ids, "max_model_len": inputs.max_model_len, "prompt": text}
    if asked.return_token_strs:
        answer["token_strs"] = [tokenizer.token_to_str(token_id) or "" for token_id in token_ids]
    if asked.return_token_texts:
        answer["token_texts"] = list(map(tokenizer.decode_token, token_ids))
    return answer


def _detokenize(inputs: InputProcessor, asked: Detokenize) -> dict[str, Any]:
    if len(asked.tokens) > MAX_TOKENS:
        raise InvalidRequestError(f"input 'utility_request': tokens must be at most {MAX_TOKENS}")
    tokenizer = inputs.tokenizer
    tokenizer.validate_ids(asked.tokens, "tokens")
    answer: dict[str, Any] = {"prompt": tokenizer.decode(asked.tokens, skip_special_tokens=False)}
    if asked.return_token_texts:
        answer["token_texts"] = list(map(tokenizer.decode_token, asked.tokens))
    return answer


def _model_info(inputs: InputProcessor) -> dict[str, Any]:
    tokenizer = inputs.optional_tokenizer
    return {
        "max_model_len": inputs.max_model_len,
        "model_type": inputs.architecture,
        "recommended_sampling": inputs.recommended_sampling,
        "chat_template": None if tokenizer is None else tokenizer.chat_template(with_tools=True),
    }
