"""Log-probabilities in the forms of the OpenAI API, and of vLLM's `prompt_logprobs`."""

from collections.abc import Mapping, Sequence
from typing import Any

from charonia_client.gateway.generation import PositionLogprobs

_MAX_GAP = 32
"""Characters of the text that tokens may leave out, such as one that several tokens make together."""

_MAX_OWED = 4096
"""Characters of tokens without any text after which they are taken for such as are not shown."""


def chat_logprobs(positions: Sequence[PositionLogprobs], num_top: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice. num_top: how many of the most likely tokens to list at each position."""
    return {"content": [_chat_position(position, num_top) for position in positions], "refusal": None}


def _chat_position(position: PositionLogprobs, num_top: int) -> dict[str, Any]:
    entries = list(position.values())
    top = sorted((e for e in entries if e["rank"] <= num_top), key=lambda e: e["rank"])
    return {**_chat_token(entries[0]), "top_logprobs": [_chat_token(entry) for entry in top]}


def _chat_token(entry: Mapping[str, Any]) -> dict[str, Any]:
    token = entry["decoded_token"]
    return {"token": token, "logprob": entry["logprob"], "bytes": list(token.encode())}


def trimmed(
    positions: Sequence[PositionLogprobs | None], num_top: int
) -> list[dict[str, Mapping[str, Any]] | None]:
    """At each position the token itself and the `num_top` most likely ones."""
    return [None if position is None else dict(_entries(position, num_top)) for position in positions]


def _entries(position: PositionLogprobs, num_top: int) -> list[tuple[str, Mapping[str, Any]]]:
    own, *others = position.items()
    return [own, *((token_id, entry) for token_id, entry in others if entry["rank"] <= num_top)]


class CompletionLogprobs:
    """The `logprobs` of a completion choice, piece by piece; offsets count characters of the whole text.

    A token that is not in the text as it is decoded alone (half a character, a special token that is not shown) begins
    where the token before it ended.
    """

    def __init__(self, num_top: int, first_token: str = "") -> None:
        """first_token: text of a prompt's first token, for which there is no log-probability."""
        self._num_top = num_top
        self._first_token = first_token
        self._offset = 0
        self._text = ""
        self._start = 0
        """In `_text`, where the text begins whose tokens are yet to come; it begins at `_offset` of the whole."""
        self._owed = ""
        """If none is left: text of tokens that is yet to come, as where a stop string may begin."""
        self._lost = False
        """Whether there may be a gap between `_offset` and the next token."""

    def piece(self, text: str, positions: Sequence[PositionLogprobs | None]) -> dict[str, Any]:
        """The object for the next tokens, and the text that came with them."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for position in positions:
            if position is None:
                tokens.append(self._first_token)
                token_logprobs.append(None)
                top.append(None)
                continue
            entries = [entry for _, entry in _entries(position, self._num_top)]
            tokens.append(entries[0]["decoded_token"])
            token_logprobs.append(entries[0]["logprob"])
            # Different tokens may decode to the same text: the more likely one is told.
            top.append({e["decoded_token"]: e["logprob"] for e in sorted(entries, key=lambda e: -e["rank"])})
        return {
            "tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top,
            "text_offset": self._offsets(text, tokens),
        }  # fmt: skip

    def _offsets(self, text: str, tokens: Sequence[str]) -> list[int]:
        self._take_text(text)
        return [self._take_token(token) for token in tokens]

    def _take_text(self, text: str) -> None:
        due = min(len(text), len(self._owed))
        if text[:due] != self._owed[:due]:
            # A token was none of the text, or is not written there as it is alone.
            due, self._owed, self._lost = 0, "", True
        self._offset += due
        self._owed = self._owed[due:]
        self._text = self._text[self._start :] + text[due:]
        self._start = 0

    def _take_token(self, token: str) -> int:
        """Where the token begins."""
        if self._owed:
            begin = self._offset + len(self._owed)
            self._owed += token
            if len(self._owed) > _MAX_OWED:
                self._owed, self._lost = "", True
            return begin
        reach = self._start + len(token) + (_MAX_GAP if self._lost else 0)
        found = self._text.find(token, self._start, reach) if token else -1
        self._lost = found < 0
        if self._lost:
            begin = self._offset
            if token.startswith(self._text[self._start : self._start + len(token) + 1]):
                known = len(self._text) - self._start
                self._owed = token[known:]
                self._advance(known)
            return begin
        self._advance(found - self._start)
        begin = self._offset
        self._advance(len(token))
        return begin

    def _advance(self, length: int) -> None:
        self._start += length
        self._offset += length
