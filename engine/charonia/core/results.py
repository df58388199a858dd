"""From what a step brought to what its requests are told."""

from collections.abc import Callable

from charonia.core.kv_manager import KVManager
from charonia.core.stats import EngineStats
from charonia.core.step import StepResult
from charonia.core.step_builder import Launched
from charonia.core.stopping import check_stop
from charonia.errors import ErrorCode
from charonia.outputs import FinishReason, TokenLogprobs
from charonia.request import Request, RequestStatus, TokenDelta

_NO_TOKEN = "no token can be sampled: the logits are not finite"
_NONE_LEFT = (
    "no token can be sampled: what the sampling parameters exclude ('bad_words', 'allowed_token_ids', 'min_tokens', "
    "'structured_outputs') leaves none"
)
_NOT_FINITE = "there is no embedding: the hidden states are not finite"


class ResultReader:
    """Appends sampled tokens to their requests, ends those that are done, and gathers the deltas.

    finish: takes a request out of the scheduler, whatever its state.
    """

    def __init__(
        self, kv: KVManager, stats: EngineStats, finish: Callable[[Request, FinishReason], None]
    ) -> None:
        self._kv = kv
        self._stats = stats
        self._finish = finish
        self._deltas: list[TokenDelta] = []

    @property
    def has_deltas(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._deltas)

    def take_deltas(self) -> list[TokenDelta]:
        """Deltas since the last call, in the order in which they came about."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def end_with_error(self, request: Request, reason: FinishReason, message: str, code: ErrorCode) -> None:
        """End a request for another reason than its tokens."""
        self._finish(request, reason)
        self._deltas.append(
            TokenDelta(
                request_id=request.request_id, finish_reason=reason, error=message, error_code=code.value
            )
        )

    def read(self, launched: Launched, result: StepResult) -> None:
        """Take a step's result; requests that have ended since its launch are passed over."""
        plan = launched.plan
        assert len(result.token_ids) == plan.num_sampled, "one token for each row that samples"
        if result.logprobs or result.prompt_logprobs or result.failed_rows or result.excluded_rows:
            for i, request in enumerate(launched.decodes):
                self._read_row(request, plan.decode_rows[i], request.num_tokens, result.token_ids[i], result)
        else:
            self._read_plain(launched.decodes, result.token_ids)
        sampled = iter(result.token_ids[len(launched.decodes) :])
        for i, chunk in enumerate(plan.chunks):
            token_id = next(sampled) if chunk.samples else None
            self._read_row(launched.chunked[i], chunk.row, launched.starts[i], token_id, result)

    def _read_plain(self, requests: list[Request], token_ids: list[int]) -> None:
        """The hot path: decoding rows that bring a token each, and nothing else. `token_ids` may be longer."""
        append, finished = self._deltas.append, RequestStatus.FINISHED
        num_tokens = len(requests)
        for request, token_id in zip(requests, token_ids, strict=False):
            if request.status is finished:
                num_tokens -= 1
                continue
            known = request.token_ids
            known.append(token_id)
            if len(known) < request.update_from and token_id not in request.stop_token_ids:
                append(TokenDelta(request_id=request.request_id, token_ids=[token_id]))
            else:
                self._note_token(request, None, None)
        self._stats.generated_tokens += num_tokens

    def _read_row(
        self, request: Request, row: int, start: int, token_id: int | None, result: StepResult
    ) -> None:
        """Any row. start: position of its first token in the step."""
        if request.status is RequestStatus.FINISHED:
            return
        if row in result.excluded_rows and request.excludes_tokens:
            self.end_with_error(request, FinishReason.ERROR, _NONE_LEFT, ErrorCode.INVALID_ARG)
            return
        if row in result.failed_rows or row in result.excluded_rows:
            # Where nothing was to be excluded, it was the logits.
            self._kv.unpublish(request)
            message = _NOT_FINITE if request.pools else _NO_TOKEN
            self.end_with_error(request, FinishReason.ERROR, message, ErrorCode.INTERNAL)
            return
        prompt_logprobs = _new_prompt_logprobs(request, start, result.prompt_logprobs.get(row))
        if token_id is not None:
            request.token_ids.append(token_id)
            self._stats.generated_tokens += 1
            self._note_token(request, result.logprobs.get(row), prompt_logprobs)
        elif prompt_logprobs:
            self._deltas.append(TokenDelta(request_id=request.request_id, prompt_logprobs=prompt_logprobs))
        elif row in result.embeddings:
            self._note_embedding(request, result.embeddings[row])

    def _note_embedding(self, request: Request, embedding: bytes) -> None:
        """A request for an embedding has what it wants."""
        self._deltas.append(
            TokenDelta(
                request_id=request.request_id,
                finish_reason=FinishReason.STOP,
                num_cached_tokens=request.num_cached_tokens,
                scheduled_time=request.scheduled_time,
                embedding=embedding,
            )
        )
        self._finish(request, FinishReason.STOP)

    def _note_token(
        self, request: Request, logprobs: TokenLogprobs | None, prompt_logprobs: list[TokenLogprobs] | None
    ) -> None:
        """Account for the token that has just been appended."""
        stop = check_stop(request)
        matcher = request.matcher
        if matcher is not None and matcher.error is not None:
            self.end_with_error(request, FinishReason.ERROR, matcher.error, ErrorCode.INVALID_ARG)
            return
        if stop is None:
            if request.status is RequestStatus.RUNNING:
                self._kv.publish(request)
            # A matcher has to see every token.
            request.update_from = (
                min(request.max_num_tokens, self._kv.next_full_block(request)) if matcher is None else 0
            )
        first = request.num_output_tokens == 1
        self._deltas.append(
            TokenDelta(
                request_id=request.request_id,
                token_ids=[request.token_ids[-1]],
                finish_reason=None if stop is None else stop.reason,
                stop_token_id=None if stop is None else stop.token_id,
                logprobs=None if logprobs is None else [logprobs],
                prompt_logprobs=prompt_logprobs,
                num_cached_tokens=request.num_cached_tokens if first else None,
                scheduled_time=request.scheduled_time if first else None,
            )
        )
        if stop is not None:
            self._finish(request, stop.reason)


def _new_prompt_logprobs(
    request: Request, start: int, entries: list[TokenLogprobs] | None
) -> list[TokenLogprobs] | None:
    """The step's prompt logprobs less those sent already: a preempted prefill computes some again."""
    if not entries:
        return None
    known = max(0, request.num_prompt_logprobs - start)
    request.num_prompt_logprobs = max(request.num_prompt_logprobs, start + len(entries))
    return entries[known:] or None
