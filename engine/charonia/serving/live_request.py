"""A request on its way through a frontend: engine deltas in, client outputs out."""

import time

from charonia.errors import CharoniaError, ErrorCode, QueueFullError, error_from_code
from charonia.outputs import CompletionOutput, PositionLogprobs, RequestOutput, RequestTimings
from charonia.request import TokenDelta
from charonia.serving.metrics import TokenMeter
from charonia.serving.request import GenerationRequest
from charonia.text import SequenceProcessor, Tokenizer, convert_logprobs


class LiveRequest:
    """Gathers the deltas of a request's sequences. Not thread-safe.

    Call `push` for each delta, then `take` for what may be shown; `finished` and `error` tell how it stands. Engine
    requests that are to be ended early (a stop string matched, a sibling failed) are listed by `take_aborts`.

    With `final_only`, `take` shows nothing until every sequence has ended, and then everything at once. Otherwise the
    first output waits for the log-probabilities of the whole prompt, if they are asked for.
    """

    def __init__(
        self, request: GenerationRequest, prompt: str | None, token_ids: list[int],
        tokenizer: Tokenizer | None, eos_token_ids: frozenset[int], *, final_only: bool = False,
        meter: TokenMeter | None = None,
    ) -> None:  # fmt: skip
        self.request = request
        self.first_id = 0
        """The engine's id of sequence 0; the others follow. Set when the request is sent."""
        self.error: CharoniaError | None = None
        self._prompt = prompt
        self._token_ids = token_ids
        self._tokenizer = tokenizer
        self._meter = meter
        self._arrival = time.monotonic() if request.arrival is None else request.arrival
        self._timings = RequestTimings()
        self._final_only = final_only
        self._open = {
            i: SequenceProcessor(
                i, tokenizer, request.params, token_ids, eos_token_ids=eos_token_ids, final_only=final_only
            )
            for i in range(request.params.n)
        }
        self._outputs: list[CompletionOutput] = []
        self._aborts: list[int] = []
        # Nothing predicts the first token.
        self._prompt_logprobs: list[PositionLogprobs | None] | None = (
            None if request.params.prompt_logprobs is None else [None]
        )
        self._num_cached_tokens = 0

    @property
    def engine_ids(self) -> range:
        """Ids of the engine requests behind this one."""
        return range(self.first_id, self.first_id + self.request.params.n)

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended, or an error has ended them all."""
        return not self._open

    @property
    def _lacks_prompt_logprobs(self) -> bool:
        """They come with sequence 0, which may be behind its siblings."""
        known = self._prompt_logprobs
        return known is not None and len(known) < len(self._token_ids)

    def plain_token_ids(self, engine_id: int) -> list[int] | None:
        """As `SequenceProcessor.plain_token_ids`, once the first token of the sequence has been pushed."""
        sequence = self._open.get(engine_id - self.first_id)
        return None if sequence is None else sequence.plain_token_ids

    def push(self, delta: TokenDelta) -> None:
        """Take a delta; those of sequences that have ended are ignored."""
        index = delta.request_id - self.first_id
        sequence = self._open.get(index)
        if sequence is None:
            return
        if delta.error is not None:
            self._fail(delta)
            return
        self._note_first(delta)
        if delta.prompt_logprobs and self._prompt_logprobs is not None:
            self._prompt_logprobs += [
                convert_logprobs(self._tokenizer, entry) for entry in delta.prompt_logprobs
            ]
        if not delta.token_ids and delta.finish_reason is None:
            return
        output = sequence.push(delta)
        if output is None:
            return
        self._outputs.append(output)
        if output.finished:
            del self._open[index]
            self._timings.total = time.monotonic() - self._arrival
            if sequence.stopped_by_text and delta.finish_reason is None:
                self._aborts.append(delta.request_id)

    def take(self) -> RequestOutput | None:
        """What is new and may be shown, or None."""
        if not self._outputs or (self._open and (self._final_only or self._lacks_prompt_logprobs)):
            return None
        outputs, self._outputs = self._outputs, []
        if self._final_only:
            outputs.sort(key=lambda output: output.index)
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            timings=self._timings,
        )

    def take_aborts(self) -> list[int]:
        """Engine requests that have become pointless since the last call."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def _fail(self, delta: TokenDelta) -> None:
        assert delta.error is not None
        siblings = (self.first_id + index for index in self._open)
        self._aborts.extend(engine_id for engine_id in siblings if engine_id != delta.request_id)
        self._open.clear()
        self._outputs.clear()
        self.error = delta_error(delta)

    def _note_first(self, delta: TokenDelta) -> None:
        if delta.scheduled_time is not None and self._timings.queue == 0.0:
            self._timings.queue = max(0.0, delta.scheduled_time - self._arrival)
        if delta.token_ids and self._timings.first_token == 0.0:
            self._timings.first_token = time.monotonic() - self._arrival
            if self._meter is not None:
                self._meter.note_first_token(self._timings, len(self._token_ids))
        if delta.num_cached_tokens is not None:
            self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)


def delta_error(delta: TokenDelta) -> CharoniaError:
    """The error that a delta brings."""
    code, message = ErrorCode(delta.error_code or ErrorCode.INTERNAL), delta.error or ""
    return QueueFullError(message) if code is ErrorCode.UNAVAILABLE else error_from_code(code, message)
