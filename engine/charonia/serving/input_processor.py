"""From a client's request to engine requests: tokenise, validate against the model, resolve defaults."""

import random
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from charonia.config import EngineConfig
from charonia.errors import InvalidRequestError, UnsupportedError
from charonia.model_config import ModelConfig
from charonia.request import EngineRequest
from charonia.sampling_params import SamplingParams
from charonia.serving.request import ChatInput, EmbeddingRequest, GenerationRequest
from charonia.text import Tokenizer
from charonia.text.chat import render_chat

MAX_PROMPT_LOGPROBS = 1 << 20
"""Log-probabilities of one prompt: tokens times alternatives. Each takes about 100 bytes of the response."""


class InputProcessor:
    """Turns requests into token ids and checks everything that a client can get wrong. Thread-safe.

    tokenizer: None where all prompts are token ids. max_model_len: the engine's context length in tokens. salt: sets
    this frontend's unseeded requests apart from those of the engine's other frontends.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer | None, *, salt: str = ""
    ) -> None:
        self.optional_tokenizer = tokenizer
        self.max_model_len = config.max_model_len or model.max_position
        self.eos_token_ids = frozenset(model.eos_token_ids)
        if tokenizer is not None:
            self.eos_token_ids |= tokenizer.eos_token_ids
        self._vocab_size = model.vocab_size
        self._model = model
        self._stop_token_ids = sorted(token for token in self.eos_token_ids if token < model.vocab_size)
        self._default_deadline_s = config.default_deadline_s
        self._random = random.Random(f"{config.seed}/{salt}")

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `InvalidRequestError` where there is none."""
        if self.optional_tokenizer is None:
            raise InvalidRequestError(
                "this needs a tokenizer, and 'skip_tokenizer_init' is set: prompts must be lists of token ids"
            )
        return self.optional_tokenizer

    @property
    def architecture(self) -> str:
        """The model's architecture, by its name in config.json."""
        return self._model.architecture

    @property
    def recommended_sampling(self) -> dict[str, Any]:
        """Sampling parameters that the checkpoint recommends; nothing here applies them."""
        return self._model.recommended_sampling

    def tokenize(self, request: GenerationRequest | EmbeddingRequest) -> tuple[str | None, list[int]]:
        """The prompt's text (None if it came as token ids) and its token ids.

        Raises `InvalidRequestError`, or `UnsupportedError` for what the model does not do at all.
        """
        generates = isinstance(request, GenerationRequest)
        if generates and not self._model.generates:
            raise UnsupportedError(
                f"this model is an encoder ({self._model.architecture}): it makes embeddings and generates no text"
            )
        text, token_ids = self._tokenize(request.prompt)
        self._check_length(token_ids, generates=generates)
        return text, token_ids

    def _tokenize(self, prompt: str | Sequence[int] | ChatInput) -> tuple[str | None, list[int]]:
        if isinstance(prompt, ChatInput):
            text = render_chat(
                self.tokenizer,
                prompt.messages,
                tools=prompt.tools,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                chat_template_kwargs=prompt.chat_template_kwargs,
            )
            # Templates write the special tokens themselves.
            return text, self._encode(text, add_special_tokens=False)
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, add_special_tokens=True)
        ids = list(prompt)
        if len(ids) <= self.max_model_len:
            self._check_ids("prompt token ids", ids)
        return None, ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.check_text_length(text)
        return self._check_text_ids(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def check_text_length(self, text: str) -> None:
        """Raise `InvalidRequestError` for a text that cannot fit into the context, whatever its tokens are.

        Seconds of tokenising are not spent on it.
        """
        if len(text) > self.max_model_len * self.tokenizer.max_chars_per_token:
            raise InvalidRequestError(
                f"the prompt has {len(text)} characters, more than the context length of {self.max_model_len} tokens "
                f"can hold"
            )

    def expand(
        self, request: GenerationRequest, token_ids: list[int], first_id: int = 0
    ) -> list[EngineRequest]:
        """One engine request per sequence (`n`), with ids from `first_id` on; only the first scores the prompt.

        Raises `InvalidRequestError`.
        """
        params = request.params
        self._check_params(params, len(token_ids))
        room = self.max_model_len - len(token_ids)
        stop_ids = list(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids += [token for token in self._stop_token_ids if token not in stop_ids]
        bad_words = self.tokenizer.bad_words_ids(params.bad_words) if params.bad_words else []
        # A tokenizer may know tokens that the model has no logits for: those never come.
        bad_words = [word for word in bad_words if max(word) < self._vocab_size]
        _check_leaves_a_token(params, stop_ids, bad_words)
        now = time.monotonic()
        timeout = request.timeout_s if request.timeout_s is not None else self._default_deadline_s
        # Random.getrandbits is one C call: safe from several threads.
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        # The prompt is the same for all sequences: it is scored with the first.
        unscored = msgspec.structs.replace(params, prompt_logprobs=None) if params.n > 1 else params
        return [
            EngineRequest(
                request_id=first_id + i,
                prompt_token_ids=token_ids,
                sampling=unscored if i else params,
                seed=_wrap_int64(seed + i),
                max_tokens=min(params.max_tokens, room) if params.max_tokens is not None else room,
                arrival_time=now,
                stop_token_ids=stop_ids,
                bad_words=bad_words,
                priority=request.priority,
                deadline=None if timeout is None else now + timeout,
                cache_salt=request.cache_salt,
            )
            for i in range(params.n)
        ]

    def expand_embedding(
        self, request: EmbeddingRequest, token_ids: list[int], first_id: int = 0
    ) -> list[EngineRequest]:
        """The one engine request of a request for an embedding. Raises `InvalidRequestError`."""
        now = time.monotonic()
        timeout = request.timeout_s if request.timeout_s is not None else self._default_deadline_s
        return [
            EngineRequest(
                request_id=first_id,
                prompt_token_ids=token_ids,
                sampling=SamplingParams(temperature=0.0),
                seed=0,
                max_tokens=1,
                arrival_time=now,
                priority=request.priority,
                deadline=None if timeout is None else now + timeout,
                cache_salt=request.cache_salt,
                pooling=request.params.resolve(self._model.pooling, self._model.hidden_size),
            )
        ]

    def _check_length(self, token_ids: list[int], *, generates: bool) -> None:
        count, limit = len(token_ids), self.max_model_len
        if not count:
            raise InvalidRequestError("the prompt is empty")
        if generates and count >= limit:
            raise InvalidRequestError(
                f"the prompt has {count} tokens, which leaves no room to generate within the context length of {limit}"
            )
        if count > limit:
            raise InvalidRequestError(
                f"the prompt has {count} tokens, more than the context length of {limit}"
            )

    def _check_text_ids(self, token_ids: list[int]) -> list[int]:
        if max(token_ids, default=0) >= self._vocab_size:
            raise InvalidRequestError(
                f"the prompt has a token ({max(token_ids)}) that the tokenizer knows and the model does not"
            )
        return token_ids

    def _check_params(self, params: SamplingParams, prompt_length: int) -> None:
        if params.prompt_logprobs is not None:
            count = prompt_length * (params.prompt_logprobs + 1)
            if count > MAX_PROMPT_LOGPROBS:
                raise InvalidRequestError(
                    f"sampling parameter 'prompt_logprobs': {prompt_length} tokens with {params.prompt_logprobs} "
                    f"alternatives are more than {MAX_PROMPT_LOGPROBS} log-probabilities"
                )
        self._check_ids("sampling parameter 'stop_token_ids'", params.stop_token_ids)
        self._check_ids("sampling parameter 'logit_bias'", list(params.logit_bias))
        self._check_ids("sampling parameter 'allowed_token_ids'", params.allowed_token_ids or [])

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self._vocab_size):
            return
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise InvalidRequestError(f"{name} must be integers, got {str(token)[:40]!r}")
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(
                    f"{name}: {token} is not in the vocabulary (0 to {self._vocab_size - 1})"
                )


def _check_leaves_a_token(
    params: SamplingParams, stop_ids: Sequence[int], bad_words: Sequence[Sequence[int]]
) -> None:
    """Raise `InvalidRequestError` where no token could be the first; the engine would find out later."""
    if params.allowed_token_ids is None:
        return
    left = set(params.allowed_token_ids).difference(word[0] for word in bad_words if len(word) == 1)
    if params.min_tokens and params.structured_outputs is None:
        left.difference_update(stop_ids)
    if not left:
        raise InvalidRequestError(
            "sampling parameter 'allowed_token_ids' leaves no token: all are excluded by 'bad_words', or are stop "
            "tokens, which 'min_tokens' excludes"
        )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
