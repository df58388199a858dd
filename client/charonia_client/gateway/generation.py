"""From the model's responses to deltas of single sequences, with the counts of the whole request."""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from charonia_client.errors import InternalServerError
from charonia_client.gateway.triton_model import TritonModel
from charonia_client.requests import GenerateRequest
from charonia_client.responses import ModelResponse

PositionLogprobs = Mapping[str, Mapping[str, Any]]
"""Alternatives at one position by token id: `logprob`, `rank`, `decoded_token`. The token itself comes first."""

_FINISH_REASONS = {"stop": "stop", "length": "length"}


@dataclass(slots=True)
class SequenceDelta:
    """What is new of one sequence. finish_reason: None unless it ends here; "stop" or "length"."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Sequence[PositionLogprobs] | None
    token_ids: Sequence[int] | None


@dataclass(slots=True)
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
    """One request to the model, and how far it has come. Iterate over it once."""

    def __init__(self, model: TritonModel, request: GenerateRequest, num_sequences: int) -> None:
        self._model = model
        self._request = request
        self._finished = [False] * num_sequences
        self.counts = TokenCounts()

    async def deltas(self) -> AsyncGenerator[list[SequenceDelta], None]:
        """For each response, what it has of each sequence that has news. Closing it early cancels the request."""
        async with aclosing(self._model.responses(self._request)) as responses:
            async for response in responses:
                try:
                    news = self._read(response)
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise InternalServerError(
                        f"the model's response does not follow the serving contract: {error!r}",
                        url=self._model.url,
                        model=self._model.name,
                    ) from error
                if news:
                    yield news

    def _read(self, response: ModelResponse) -> list[SequenceDelta]:
        outputs = response.outputs
        texts = outputs["text_output"]
        reasons = outputs["finish_reason"]
        lengths = outputs.get("num_output_tokens")
        if lengths is not None:
            self._count(outputs, lengths)
        logprobs = outputs.get("logprobs")
        token_ids = _split(outputs["token_ids"], lengths) if "token_ids" in outputs else None
        news: list[SequenceDelta] = []
        for index, text in enumerate(texts):
            ends = reasons[index] != "None" and not self._finished[index]
            ids = token_ids[index] if token_ids is not None else None
            if not text and not ends and not ids:
                continue
            reason = None
            if ends:
                self._finished[index] = True
                reason = _FINISH_REASONS.get(reasons[index], "stop")
            found = json.loads(logprobs[index]) if logprobs is not None else None
            news.append(SequenceDelta(index, text, reason, found, ids))
        return news

    def _count(self, outputs: Mapping[str, Sequence[Any]], lengths: Sequence[int]) -> None:
        self.counts.completion += sum(lengths)
        if "num_input_tokens" in outputs:
            self.counts.prompt = outputs["num_input_tokens"][0]
        if "timings" in outputs:
            self.counts.cached = json.loads(outputs["timings"][0]).get("num_cached_tokens")


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
