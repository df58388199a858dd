"""Log-probabilities in the two forms of the OpenAI API."""

from collections.abc import Mapping, Sequence
from typing import Any

from charonia_client.gateway.generation import PositionLogprobs


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


class CompletionLogprobs:
    """The `logprobs` of a completion choice, piece by piece; offsets count characters of the whole text."""

    def __init__(self, offset: int = 0) -> None:
        """offset: length of the text in front of the first token (the prompt's, where it is echoed)."""
        self._offset = offset

    def piece(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """The object for the next positions."""
        tokens: list[str] = []
        token_logprobs: list[float] = []
        top: list[dict[str, float]] = []
        offsets: list[int] = []
        for position in positions:
            entries = list(position.values())
            token = entries[0]["decoded_token"]
            tokens.append(token)
            token_logprobs.append(entries[0]["logprob"])
            # Different tokens may decode to the same text: the more likely one is told.
            top.append({e["decoded_token"]: e["logprob"] for e in sorted(entries, key=lambda e: -e["rank"])})
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top, "text_offset": offsets,
        }  # fmt: skip
