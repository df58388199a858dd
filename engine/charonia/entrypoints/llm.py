"""Offline inference: `LLM(model).generate(prompts)`."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tqdm import tqdm

from charonia.config import EngineConfig
from charonia.core.stats import EngineStats
from charonia.errors import InvalidRequestError
from charonia.model_config import ModelConfig
from charonia.outputs import RequestOutput
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
        sampling_params: one for all, or one for each. Raises `InvalidRequestError` before anything runs.
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
        lives = [self._prepare(request) for request in requests]
        by_id = {engine_id: live for live, _ in lives for engine_id in live.engine_ids}
        results: dict[int, RequestOutput] = {}
        with tqdm(total=len(lives), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                for _, engine_requests in lives:
                    for request in engine_requests:
                        self._core.add(request)
                while by_id:
                    self._step(by_id, results, bar)
            finally:
                # Interrupted or failed: nothing of this call may linger in the engine.
                for engine_id in by_id:
                    self._core.abort(engine_id)
                while self._core.has_work:
                    self._core.step()
        return [results[live.first_id] for live, _ in lives]

    def _prepare(self, request: GenerationRequest) -> tuple[LiveRequest, list[Any]]:
        prompt, token_ids = self._inputs.tokenize(request)
        first_id, self._next_id = self._next_id, self._next_id + request.params.n
        live = LiveRequest(request, prompt, token_ids, self._inputs.tokenizer, self._inputs.eos_token_ids)
        live.first_id = first_id
        return live, self._inputs.expand(request, token_ids, first_id)

    def _step(
        self, by_id: dict[int, LiveRequest], results: dict[int, RequestOutput], bar: "tqdm[Any]"
    ) -> None:
        touched: dict[int, LiveRequest] = {}
        for delta in self._core.step():
            live = by_id.get(delta.request_id)
            if live is not None:
                live.push(delta)
                touched[live.first_id] = live
        for live in touched.values():
            for engine_id in live.take_aborts():
                self._core.abort(engine_id)
            if live.error is not None:
                raise live.error
            output = live.take()
            if output is not None:
                _accumulate(results, live.first_id, output)
            if live.finished:
                for engine_id in live.engine_ids:
                    del by_id[engine_id]
                bar.update()


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
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(Sequence[int], prompts)]
    return cast(Sequence[Prompt], prompts)


def _prompt_input(prompt: Prompt) -> str | Sequence[int]:
    if isinstance(prompt, Mapping):
        for key in ("prompt_token_ids", "prompt"):
            if prompt.get(key) is not None:
                return cast(str | Sequence[int], prompt[key])
        raise InvalidRequestError("a prompt mapping needs 'prompt' or 'prompt_token_ids'")
    return prompt
