"""Text of a growing sequence, token by token, at constant cost a token."""

from collections.abc import Sequence

from charonia.text.token_bytes import ByteStream
from charonia.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6
"""Tokens of context that a decoder which looks at its neighbours is shown."""
_MAX_TOKENS_PER_CHARACTER = 4
"""A UTF-8 character has at most four bytes, so at most four tokens."""


class IncrementalDetokenizer:
    """Turns the tokens of one sequence into text as they come. Every delta is whole characters.

    Invariant: the deltas, joined, are `decode(prompt + output)` less `decode(prompt)`. For ByteLevel
    tokenizers that is `decode(output)`. For those that drop a space at the beginning of a text it differs
    from `decode(output)` by that space, which is kept when anything visible precedes. Bytes that the prompt
    leaves incomplete are never completed by the output. U+FFFD stands only for bytes that can complete no
    character.
    """

    __slots__ = ("_last_added", "_skip_special_tokens", "_split", "_stream", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids_tail: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """prompt_token_ids_tail: the prompt, or its last tokens, a visible one among them."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._split = not skip_special_tokens and not spaces_between_special_tokens
        self._last_added = False
        self._stream = self._open(prompt_token_ids_tail)

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete; may be empty."""
        if not self._split:
            return self._stream.push(token_ids)
        pieces: list[str] = []
        for token_id in token_ids:
            added = token_id in self._tokenizer.added_ids
            if added and self._last_added:
                pieces.append(self._stream.flush())
                self._stream = self._open(())
            self._last_added = added
            pieces.append(self._stream.push([token_id]))
        return "".join(pieces)

    def flush(self) -> str:
        """At the end: the text still held back, incomplete characters replaced by U+FFFD."""
        return self._stream.flush()

    def _open(self, context: Sequence[int]) -> "ByteStream | _WindowStream":
        codec = self._tokenizer.codec
        if codec is None:
            return _WindowStream(self._tokenizer, context, self._skip_special_tokens)
        begins_text = codec.begins_text(reversed(context), self._skip_special_tokens)
        return codec.stream(self._skip_special_tokens, begins_text)


class _WindowStream:
    """For decoders that look at neighbouring tokens: decodes a short window twice and releases the
    difference.

    `_ids[:_read]` is text already released, kept as context; `_ids[_read:]` is held back.
    """

    __slots__ = ("_ids", "_read", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip_special_tokens: bool) -> None:
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        visible = (token_id for token_id in reversed(context) if token_id not in hidden)
        self._ids = [token_id for token_id, _ in zip(visible, range(_CONTEXT_TOKENS), strict=False)][::-1]
        self._read = len(self._ids)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete."""
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The text held back."""
        return self._release()

    def _push_one(self, token_id: int) -> str:
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        if len(self._ids) - self._read < _MAX_TOKENS_PER_CHARACTER and self._decode(self._ids).endswith(
            "\ufffd"
        ):
            return ""
        return self._release()

    def _release(self) -> str:
        released = self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]
        self._read = len(self._ids)
        if self._read > 2 * _CONTEXT_TOKENS:
            del self._ids[:-_CONTEXT_TOKENS]
            self._read = _CONTEXT_TOKENS
        return released

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode_with_backend(ids, self._skip_special_tokens)
