"""From the model's responses to deltas of single sequences, with the counts of the whole request."""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from charonia_client.errors import InternalServerError
from charonia_client.gateway.triton_model import TritonModel
from charonia_client.requests import GenerateRequest
from charonia_client.responses import NOT_FINISHED

PositionLogprobs = Mapping[str, Mapping[str, Any]]
"""Alternatives at one position by token id: `logprob`, `rank`, `decoded_token`. The token itself comes first."""

_FINISH_REASONS = {"stop": "stop", "length": "length"}


@dataclass(slots=True)
class SequenceDelta:
    """What is new of one sequence. finish_reason: None unless it ends here; "stop" or "length".

    stop_reason: the stop string or stop token id that ended it, as far as the request has any. counts: those of the
    request, up to here.
    """

    index: int
    text: str
    finish_reason: str | None
    logprobs: Sequence[PositionLogprobs] | None
    token_ids: Sequence[int] | None
    counts: "TokenCounts"
    stop_reason: int | str | None = None


@dataclass(slots=True, frozen=True)
class TokenCounts:
    """Tokens of a request, or of several. cached: prompt tokens found in the prefix cache; None if not told."""

    prompt: int = 0
    completion: int = 0
    cached: int | None = None

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        cached = (
            None if self.cached is None and other.cached is None else (self.cached or 0) + (other.cached or 0)
        )
        return TokenCounts(self.prompt + other.prompt, self.completion + other.completion, cached)

    def usage(self) -> dict[str, Any]:
        """The `usage` object of the OpenAI API."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }
        if self.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return usage


class Generation:
    """One request to the model, and how far it has come. Iterate over it once.

    prompt_logprobs: set with the first deltas, if the request asks for them; None at the first token.
    prompt_only: only the prompt is of interest; the token that the model generates all the same counts for nothing.
    """

    def __init__(
        self, model: TritonModel, request: GenerateRequest, num_sequences: int, *, prompt_only: bool = False
    ) -> None:
        self._model = model
        self._request = request
        self._prompt_only = prompt_only
        self._finished = [False] * num_sequences
        self.counts = TokenCounts()
        self.prompt_logprobs: Sequence[PositionLogprobs | None] | None = None

    async def deltas(self) -> AsyncGenerator[list[SequenceDelta], None]:
        """What is new of each sequence, each time as much as has come. Closing it early cancels the request."""
        async with aclosing(self._model.batches(self._request)) as batches:
            async for batch in batches:
                news: list[SequenceDelta] = []
                try:
                    for response in batch:
                        self._read(response.outputs, news)
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise InternalServerError(
                        f"the model's response does not follow the serving contract: {error!r}",
                        url=self._model.url,
                        model=self._model.name,
                    ) from error
                if news:
                    yield list(map(_without_output, news)) if self._prompt_only else news

    def _read(self, outputs: Mapping[str, Sequence[Any]], news: list[SequenceDelta]) -> None:
        texts = outputs["text_output"]
        reasons = outputs["finish_reason"]
        lengths = outputs.get("num_output_tokens")
        if lengths is not None:
            self.counts = self._counted(outputs, lengths)
        if self.prompt_logprobs is None and self._request.inputs.get("return_prompt_logprobs"):
            self.prompt_logprobs = _present(json.loads(outputs["prompt_logprobs"][0]))
        logprobs = outputs.get("logprobs")
        token_ids = _split(outputs["token_ids"], lengths) if "token_ids" in outputs else None
        for index, text in enumerate(texts):
            ends = reasons[index] != NOT_FINISHED and not self._finished[index]
            ids = token_ids[index] if token_ids is not None else None
            if not text and not ends and not ids:
                continue
            reason = None
            if ends:
                self._finished[index] = True
                reason = _FINISH_REASONS.get(reasons[index], "stop")
            found = json.loads(logprobs[index]) if logprobs is not None else None
            cause = json.loads(outputs["stop_reason"][index]) if ends and "stop_reason" in outputs else None
            news.append(SequenceDelta(index, text, reason, found, ids, self.counts, cause))

    def _counted(self, outputs: Mapping[str, Sequence[Any]], lengths: Sequence[int]) -> TokenCounts:
        prompt, cached = self.counts.prompt, self.counts.cached
        completion = self.counts.completion + (0 if self._prompt_only else sum(lengths))
        if "num_input_tokens" in outputs:
            prompt = outputs["num_input_tokens"][0]
        if "timings" in outputs:
            cached = json.loads(outputs["timings"][0]).get("num_cached_tokens")
        return TokenCounts(prompt, completion, cached)


def _without_output(delta: SequenceDelta) -> SequenceDelta:
    return SequenceDelta(delta.index, "", "length", None, None, delta.counts)


def _present(positions: Sequence[PositionLogprobs | None] | None) -> Sequence[PositionLogprobs | None]:
    if positions is None:
        raise ValueError("the first response has no prompt_logprobs")
    return positions


def _split(flat: Sequence[int], lengths: Sequence[int] | None) -> list[Sequence[int]]:
    """Cut the ids of all sequences, which come one after the other, at each sequence's length."""
    if lengths is None or len(lengths) == 1:
        return [flat]
    return list(_slices(flat, lengths))


def _slices(flat: Sequence[int], lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    for length in lengths:
        yield flat[start : start + length]
        start += length
