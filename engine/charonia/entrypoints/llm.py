"""Offline inference: `LLM(model).generate(prompts)`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from tqdm import tqdm

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.entrypoints.interrupt import deferred_interrupt
from charonia.errors import EngineDeadError, InvalidRequestError
from charonia.model_config import ModelConfig
from charonia.outputs import RequestOutput
from charonia.request import EngineRequest, TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.serving.engine_builder import build_engine
from charonia.serving.input_processor import InputProcessor
from charonia.serving.live_request import LiveRequest
from charonia.serving.request import ChatInput, GenerationRequest
from charonia.text import Tokenizer, merge

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model in this process. Not thread-safe.

    Keyword arguments are the settings of `EngineConfig`. Raises `ConfigError` or `ModelLoadError`.

        llm = LLM("/models/SmolLM2-135M-Instruct", dtype="float32")
        for output in llm.generate(["Hello, my name is"], SamplingParams(temperature=0.0)):
            print(output.outputs[0].text)
    """

    def __init__(self, model: str, **settings: Any) -> None:
        config = EngineConfig.from_mapping({"max_waiting_requests": 1 << 30, **settings, "model": str(model)})
        model_config = ModelConfig.from_dir(config.model)
        self._inputs = InputProcessor(config, model_config, Tokenizer.from_dir(config.tokenizer_dir))
        self._core, self._summary = build_engine(config, model_config)
        self._next_id = 0
        self._failed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs come in the prompts' order.

        prompts: a string, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`, or a list of these.
        sampling_params: one for all, or one for each. priority: of each prompt; lower runs first.

        Raises `InvalidRequestError` before anything runs. What ends one request with an error, or Ctrl-C, ends the
        call: the engine drops its other requests and is ready for the next call.
        """
        inputs = [_prompt_input(prompt) for prompt in _as_batch(prompts)]
        return self._run(self._requests(inputs, sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
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
        return self._run(self._requests(inputs, sampling_params, None), use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._inputs.tokenizer

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self._core.stats()

    def shutdown(self) -> None:
        """Release the device; the object is of no use afterwards."""
        self._core.shutdown()

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
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(inputs)
        for name, values in (("sampling_params", params), ("priority", priority)):
            if values is not None and len(values) != len(inputs):
                raise InvalidRequestError(f"{name} has {len(values)} entries for {len(inputs)} prompts")
        return [
            GenerationRequest(
                prompt=prompt, params=params[i], request_id=str(i), priority=priority[i] if priority else 0
            )
            for i, prompt in enumerate(inputs)
        ]

    def _run(self, requests: list[GenerationRequest], use_tqdm: bool) -> list[RequestOutput]:
        if self._failed:
            raise EngineDeadError("the engine has failed; make a new LLM")
        prepared = [self._prepare(request) for request in requests]
        by_id = {engine_id: live for live, _ in prepared for engine_id in live.engine_ids}
        results: dict[int, RequestOutput] = {}
        with (
            tqdm(total=len(prepared), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar,
            deferred_interrupt() as check_interrupt,
        ):
            try:
                for _, engine_requests in prepared:
                    for request in engine_requests:
                        self._core.add(request)
                while by_id:
                    check_interrupt()
                    bar.update(self._advance(by_id, results))
            finally:
                self._clear(by_id)
        return [results[live.first_id] for live, _ in prepared]

    def _prepare(self, request: GenerationRequest) -> tuple[LiveRequest, list[EngineRequest]]:
        prompt, token_ids = self._inputs.tokenize(request)
        first_id, self._next_id = self._next_id, self._next_id + request.params.n
        live = LiveRequest(request, prompt, token_ids, self._inputs.tokenizer, self._inputs.eos_token_ids)
        live.first_id = first_id
        return live, self._inputs.expand(request, token_ids, first_id)

    def _advance(self, by_id: dict[int, LiveRequest], results: dict[int, RequestOutput]) -> int:
        """One step; how many requests finished."""
        touched: dict[int, LiveRequest] = {}
        for delta in self._step():
            live = by_id.get(delta.request_id)
            if live is not None:
                live.push(delta)
                touched[live.first_id] = live
        num_finished = 0
        for live in touched.values():
            for engine_id in live.take_aborts():
                self._core.abort(engine_id)
            if live.error is not None:
                raise live.error
            output = live.take()
            if output is not None:
                _accumulate(results, live.first_id, output)
            if live.finished:
                num_finished += 1
                for engine_id in live.engine_ids:
                    del by_id[engine_id]
        return num_finished

    def _step(self) -> list[TokenDelta]:
        try:
            return self._core.step()
        except BaseException:
            # Whatever it was, what the engine holds is not to be trusted any more.
            self._failed = True
            raise

    def _clear(self, engine_ids: Iterable[int]) -> None:
        """End requests, and run the steps that still touch them."""
        if self._failed:
            return
        for engine_id in engine_ids:
            self._core.abort(engine_id)
        while self._core.has_work:
            self._step()


def _accumulate(results: dict[int, RequestOutput], key: int, output: RequestOutput) -> None:
    """Join a delta to what came before; sequences stay in order of their index."""
    known = results.get(key)
    sequences = {sequence.index: sequence for sequence in known.outputs} if known else {}
    for delta in output.outputs:
        before = sequences.get(delta.index)
        sequences[delta.index] = delta if before is None else merge(before, delta)
    output.outputs = [sequences[index] for index in sorted(sequences)]
    results[key] = output


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) > 0 and all(isinstance(item, int) for item in prompts):
        return [cast(Sequence[int], prompts)]
    return cast(Sequence[Prompt], prompts)


def _prompt_input(prompt: Prompt) -> str | Sequence[int]:
    value: object = prompt
    if isinstance(prompt, Mapping):
        value = next(
            (prompt[key] for key in ("prompt_token_ids", "prompt") if prompt.get(key) is not None), None
        )
    if isinstance(value, str) or (isinstance(value, Sequence) and not isinstance(value, bytes)):
        return value
    raise InvalidRequestError(
        "a prompt must be a string, a list of token ids, or a mapping with 'prompt' or 'prompt_token_ids', "
        f"got {type(value).__name__}"
    )
