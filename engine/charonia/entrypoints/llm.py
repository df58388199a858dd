"""Offline inference: `LLM(model).generate(prompts)`, `LLM(model).embed(prompts)`."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from charonia.core.engine_core import StepTimes
from charonia.core.stats import EngineStats
from charonia.entrypoints.interrupt import deferred_interrupt
from charonia.entrypoints.offline_batch import Live, OfflineBatch, Output
from charonia.entrypoints.offline_settings import each_sampling, offline_config
from charonia.errors import EngineDeadError, InvalidRequestError, UnsupportedError
from charonia.model_config import ModelConfig
from charonia.outputs import EmbeddingRequestOutput, RequestOutput
from charonia.pooling_params import PoolingParams
from charonia.request import EngineRequest, TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.serving.engine_builder import build_engine
from charonia.serving.input_processor import InputProcessor
from charonia.serving.live_embedding import LiveEmbedding
from charonia.serving.live_request import LiveRequest
from charonia.serving.request import ChatInput, EmbeddingRequest, GenerationRequest
from charonia.text import Tokenizer

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Prompt = str | TokenIds | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model in this process. Not thread-safe.

    Keyword arguments are the settings of `EngineConfig`; those of vLLM that mean nothing here are ignored with a
    warning, as in `1/model.json`. With `skip_tokenizer_init`, prompts are token ids and outputs have no text. Raises
    `ConfigError` or `ModelLoadError`.

    What lives in the process once the model is loaded is exempted from garbage collection (`gc.freeze`), so that no
    step waits for the collector to walk it; `shutdown` undoes that.

        llm = LLM("/models/SmolLM2-135M-Instruct", dtype="float32")
        for output in llm.generate(["Hello, my name is"], SamplingParams(temperature=0.0)):
            print(output.outputs[0].text)
    """

    def __init__(self, model: str, **settings: Any) -> None:
        config = offline_config(model, settings)
        model_config = ModelConfig.from_dir(config.model)
        tokenizer = None if config.skip_tokenizer_init else Tokenizer.from_dir(config.tokenizer_dir)
        self._inputs = InputProcessor(config, model_config, tokenizer)
        self._default_sampling = SamplingParams.from_mapping(model_config.recommended_sampling)
        self._core, self._summary = build_engine(config, model_config)
        self._next_id = 0
        self._failed = False
        gc.collect()
        gc.freeze()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | npt.NDArray[np.integer[Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs come in the prompts' order.

        prompts: a string, a list or array of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`, or a list of
        these.
        sampling_params: one for all, or one for each; `get_default_sampling_params()` by default. priority: of each
        prompt; lower runs first.

        Raises `InvalidRequestError` before anything runs. What ends one request with an error, or Ctrl-C, ends the
        call: the engine drops its other requests and is ready for the next call.
        """
        inputs = [_prompt_input(prompt) for prompt in _as_batch(prompts)]
        requests = self._requests(inputs, sampling_params, priority)
        return cast(list[RequestOutput], self._run(requests, use_tqdm))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt] | npt.NDArray[np.integer[Any]],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Embed each prompt; outputs come in the prompts' order. Prompts and errors are those of `generate`.

        pooling_params: one for all, or one for each.
        """
        inputs = [_prompt_input(prompt) for prompt in _as_batch(prompts)]
        if pooling_params is None or isinstance(pooling_params, PoolingParams):
            pooling_params = [pooling_params or PoolingParams()] * len(inputs)
        if len(pooling_params) != len(inputs):
            raise InvalidRequestError(
                f"pooling_params has {len(pooling_params)} entries for {len(inputs)} prompts"
            )
        requests = [
            EmbeddingRequest(prompt=prompt, params=params, request_id=str(i))
            for i, (prompt, params) in enumerate(zip(inputs, pooling_params, strict=True))
        ]
        return cast(list[EmbeddingRequestOutput], self._run(requests, use_tqdm))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations, with the model's chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [cast(Messages, messages)] if one else cast(Sequence[Messages], messages)
        inputs = [
            ChatInput(
                messages=conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs or {},
            )
            for conversation in conversations
        ]
        return cast(list[RequestOutput], self._run(self._requests(inputs, sampling_params, None), use_tqdm))

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends: how `generate` and `chat` sample unless told."""
        return self._default_sampling

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `InvalidRequestError` with `skip_tokenizer_init`."""
        return self._inputs.tokenizer

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self._core.stats()

    def step_times(self) -> StepTimes:
        """Where the time of the steps so far went; goes on counting."""
        return self._core.times

    def shutdown(self) -> None:
        """Release the device; the object is of no use afterwards."""
        self._core.shutdown()
        gc.unfreeze()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _requests(
        self,
        inputs: Sequence[str | Sequence[int] | ChatInput],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[GenerationRequest]:
        each = each_sampling(self._default_sampling if params is None else params, len(inputs))
        params = [self._checked(item) for item in each]
        for name, values in (("sampling_params", params), ("priority", priority)):
            if values is not None and len(values) != len(inputs):
                raise InvalidRequestError(f"{name} has {len(values)} entries for {len(inputs)} prompts")
        return [
            GenerationRequest(
                prompt=prompt, params=params[i], request_id=str(i), priority=priority[i] if priority else 0
            )
            for i, prompt in enumerate(inputs)
        ]

    def _checked(self, params: SamplingParams) -> SamplingParams:
        """The parameters as they can be had: without a tokenizer there is no text."""
        if params.detokenize and self._inputs.optional_tokenizer is None:
            return msgspec.structs.replace(params, detokenize=False)
        return params

    def _run(self, requests: Sequence[GenerationRequest | EmbeddingRequest], use_tqdm: bool) -> list[Output]:
        if self._failed:
            raise EngineDeadError("the engine has failed; make a new LLM")
        prepared = [self._prepare(request) for request in requests]
        batch = OfflineBatch(self._core)
        with (
            tqdm(total=len(prepared), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar,
            deferred_interrupt() as check_interrupt,
        ):
            try:
                for live, engine_requests in prepared:
                    batch.add(live, engine_requests)
                while batch.num_open:
                    check_interrupt()
                    num_finished = batch.push(self._step())
                    if num_finished:
                        bar.update(num_finished)
            finally:
                self._clear(batch)
        return batch.results(live for live, _ in prepared)

    def _prepare(self, request: GenerationRequest | EmbeddingRequest) -> tuple[Live, list[EngineRequest]]:
        inputs = self._inputs
        prompt, token_ids = inputs.tokenize(request)
        if isinstance(request, EmbeddingRequest):
            embedding = LiveEmbedding(request, token_ids)
            embedding.first_id, self._next_id = self._next_id, self._next_id + 1
            return embedding, inputs.expand_embedding(request, token_ids, embedding.first_id)
        first_id, self._next_id = self._next_id, self._next_id + request.params.n
        live = LiveRequest(
            request, prompt, token_ids, inputs.optional_tokenizer, inputs.eos_token_ids, final_only=True
        )
        live.first_id = first_id
        return live, inputs.expand(request, token_ids, first_id)

    def _step(self) -> list[TokenDelta]:
        try:
            return self._core.step()
        except BaseException:
            # Whatever it was, what the engine holds is not to be trusted any more.
            self._failed = True
            raise

    def _clear(self, batch: OfflineBatch) -> None:
        """End what is left of a batch, and run the steps that still touch it."""
        if self._failed:
            return
        batch.abort()
        while self._core.has_work:
            self._step()


_PROMPT_KEYS = ("prompt_token_ids", "prompt")
"""Where a prompt is looked for, in this order."""


def _as_batch(prompts: Prompt | Sequence[Prompt] | npt.NDArray[np.integer[Any]]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if not isinstance(prompts, Sequence):
        raise _no_prompt(prompts)
    if len(prompts) > 0 and all(isinstance(item, int) for item in prompts):
        return [cast(Sequence[int], prompts)]
    return cast(Sequence[Prompt], prompts)


def _prompt_input(prompt: Prompt) -> str | Sequence[int]:
    value: object = prompt
    if isinstance(prompt, Mapping):
        value = next((prompt[key] for key in _PROMPT_KEYS if prompt.get(key) is not None), None)
        extra = next((key for key in prompt if key not in _PROMPT_KEYS and prompt[key] is not None), None)
        if value is not None and extra is not None:
            raise UnsupportedError(
                f"a prompt's {str(extra)[:40]!r} is not supported, only text and token ids are"
            )
    if isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.integer):
        return cast(list[int], value.tolist())
    if isinstance(value, str) or (isinstance(value, Sequence) and not isinstance(value, bytes)):
        return value
    raise _no_prompt(value)


def _no_prompt(value: object) -> InvalidRequestError:
    return InvalidRequestError(
        "a prompt must be a string, a list or array of token ids, or a mapping with 'prompt' or 'prompt_token_ids', "
        f"got {type(value).__name__}"
    )
