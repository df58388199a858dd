"""From the engine's tokens to what a client sees: text, logprobs, the reason of the end."""

from charonia.outputs import CompletionOutput, FinishReason, Logprob, PositionLogprobs, TokenLogprobs
from charonia.request import TokenDelta
from charonia.sampling_params import SamplingParams
from charonia.text.detokenizer import IncrementalDetokenizer
from charonia.text.stop import StopChecker, StopMatch
from charonia.text.tokenizer import Tokenizer


class SequenceProcessor:
    """Client-side state of one sequence of a request.

    Tokens whose text is still held back (half a character, the beginning of a stop string, special tokens
    that are skipped) wait and go out with the next text, so no delta but the last is ever without text. Token
    ids always keep the stop token. When a stop string matches, only text is cut: every token up to the one
    that completed the match is kept, with its logprobs, and tokens after it are dropped, however the engine
    grouped them into deltas.

    With `final_only` everything waits for the end. Unless a stop string may end the sequence before, the tokens
    are detokenised there, at once.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: list[int],
        *,
        eos_token_ids: frozenset[int] | None = None,
        final_only: bool = False,
    ) -> None:
        """index: of the sequence in its request. tokenizer: may be left out where nothing is detokenised.
        eos_token_ids: the tokenizer's by default; these, when they end the sequence, are no `stop_reason`, unless
        the request lists them in `stop_token_ids`.
        """
        self._index = index
        self._tokenizer = tokenizer
        self._params = params
        if eos_token_ids is None:
            eos_token_ids = frozenset() if tokenizer is None else tokenizer.eos_token_ids
        eos = eos_token_ids
        self._silent_stop_ids = eos.difference(params.stop_token_ids)
        self._detokenizer: IncrementalDetokenizer | None = None
        if params.detokenize:
            assert tokenizer is not None, "whoever leaves the tokenizer out switches `detokenize` off"
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
            )
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._num_tokens = 0
        self._cumulative_logprob = 0.0
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._final_only = final_only
        self._deferred = final_only and self._stop is None and params.logprobs is None
        """Whether nothing needs to be known of the tokens before the last has come."""
        self._pieces: list[str] = []
        """Text that waits for the end, with `final_only`."""
        self._finished = False
        self._stopped_by_text = False

    @property
    def finished(self) -> bool:
        """Whether the last delta has been returned; anything later is ignored."""
        return self._finished

    @property
    def stopped_by_text(self) -> bool:
        """Whether a stop string ended the sequence: the engine does not know, so the caller must abort its
        request.
        """
        return self._stopped_by_text

    @property
    def plain_token_ids(self) -> list[int] | None:
        """Where nothing happens to the tokens on their way: the list that they may be appended to instead of being
        pushed. The delta that ends the sequence must be pushed. None where there is more to do.
        """
        return self._token_ids if self._deferred else None

    def push(self, delta: TokenDelta) -> CompletionOutput | None:
        """Take in one delta of the engine. Returns what to show, or None when nothing may be shown yet."""
        if self._finished:
            return None
        if self._deferred and delta.finish_reason is None:
            self._token_ids += delta.token_ids
            return None
        text = self._read(delta)
        if isinstance(text, StopMatch):
            self._stopped_by_text = delta.finish_reason is None
            return self._end(text.text, FinishReason.STOP, text.stop_string)
        if delta.finish_reason is not None:
            silent = delta.stop_token_id in self._silent_stop_ids
            return self._end(text, delta.finish_reason, None if silent else delta.stop_token_id)
        if self._final_only:
            self._pieces.append(text)
        elif text or (self._detokenizer is None and self._token_ids):
            return self._take(text)
        return None

    def _read(self, delta: TokenDelta) -> str | StopMatch:
        """Account for the delta's tokens. Returns the text that they release, or the match that ends the
        sequence.
        """
        token_ids = delta.token_ids
        if self._detokenizer is None or self._stop is None:
            self._account(delta, 0, len(token_ids))
            return "" if self._detokenizer is None else self._detokenize(self._detokenizer, delta)
        text = ""
        for i, token_id in enumerate(token_ids):
            self._account(delta, i, i + 1)
            if i == len(token_ids) - 1 and self._hides_last_token(delta):
                break
            released = self._check(self._stop, text, self._detokenizer.push([token_id]))
            if isinstance(released, StopMatch):
                return released
            text = released
        if delta.finish_reason is None:
            return text
        released = self._check(self._stop, text, self._detokenizer.flush())
        return released if isinstance(released, StopMatch) else released + self._stop.flush()

    def _detokenize(self, detokenizer: IncrementalDetokenizer, delta: TokenDelta) -> str:
        if delta.finish_reason is None:
            return detokenizer.push(delta.token_ids)
        token_ids = self._token_ids if self._deferred else delta.token_ids
        shown = token_ids[:-1] if self._hides_last_token(delta) else token_ids
        return detokenizer.push(shown) + detokenizer.flush()

    def _hides_last_token(self, delta: TokenDelta) -> bool:
        """Whether the last token is the stop token, whose text is no part of the output unless asked for."""
        ids, stop_id = delta.token_ids, delta.stop_token_id
        return bool(ids) and ids[-1] == stop_id and not self._params.include_stop_str_in_output

    def _check(self, stop: StopChecker, text: str, more: str) -> str | StopMatch:
        """`text` is released already, `more` has yet to be checked; returns both, less what is held back."""
        # As with stop tokens, min_tokens come before the first token that may end the sequence.
        released = stop.push(more, armed=self._num_tokens > self._params.min_tokens)
        if isinstance(released, StopMatch):
            return StopMatch(text + released.text, released.stop_string)
        return text + released

    def _account(self, delta: TokenDelta, begin: int, end: int) -> None:
        """Count the tokens `begin` to `end` of the delta towards the next output."""
        self._token_ids.extend(delta.token_ids[begin:end])
        self._num_tokens += end - begin
        if delta.logprobs is None:
            return
        for position in delta.logprobs[begin:end]:
            self._cumulative_logprob += position.logprobs[0]
            if self._params.logprobs is not None:
                self._logprobs.append(convert_logprobs(self._tokenizer, position))

    def _take(self, text: str) -> CompletionOutput:
        """What has gathered since the last output, with `text`."""
        output = CompletionOutput(
            index=self._index,
            text=text,
            token_ids=self._token_ids,
            cumulative_logprob=self._cumulative_logprob,
            logprobs=None if self._params.logprobs is None else self._logprobs,
        )
        self._token_ids = []
        self._logprobs = []
        return output

    def _end(self, text: str, finish_reason: FinishReason, stop_reason: int | str | None) -> CompletionOutput:
        self._finished = True
        output = self._take("".join((*self._pieces, text)))
        output.finish_reason = finish_reason
        output.stop_reason = stop_reason
        return output


def convert_logprobs(tokenizer: Tokenizer | None, position: TokenLogprobs) -> PositionLogprobs:
    """What clients see of one position, of the prompt or of the output: the token itself first, then the
    best.

    Ranks are unique even among equal log-probabilities: alternatives count 1, 2, ... and the token itself has
    its place among them or comes after them. Without a tokenizer, tokens have no text.
    """
    own_id, *best = position.token_ids
    place = best.index(own_id) + 1 if own_id in best else max(position.rank, len(best) + 1)
    ranks = [place, *range(1, len(best) + 1)]
    converted: PositionLogprobs = {}
    for token_id, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True):
        if token_id not in converted:
            text = "" if tokenizer is None else tokenizer.decode_token(token_id)
            converted[token_id] = Logprob(logprob, rank, text)
    return converted
