"""What each token stands for, in bytes, where a tokenizer's decoder treats tokens one by one.

Two families of decoders cover nearly every generative model: ByteLevel (GPT-2, Llama 3, Qwen, SmolLM2: every
token is a run of bytes in a printable alphabet) and Metaspace with or without byte fallback (Llama 2,
Mistral, Gemma: a token is text with "▁" for a space, or one raw byte written as "<0xE2>"). In both, the text
of a sequence is the UTF-8 decoding of its tokens' bytes, apart from one space that may be dropped where the
text begins.
"""

import codecs
import re
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, NamedTuple

import msgspec
from tokenizers import Tokenizer as Backend

REPLACE_EACH_BYTE = "charonia.replace_each_byte"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: one U+FFFD for every ill-formed byte, as byte-fallback decoders write them."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)


class LeadingSpace(Enum):
    """What a decoder drops at the very beginning of a text."""

    KEEP = auto()
    DROP_FROM_TEXT = auto()
    """One space, should the text begin with one."""
    DROP_FROM_TOKEN = auto()
    """Every space of the first token."""


class TokenBytes(dict[int, bytes]):
    """Token id to its bytes; filled on first use. Ids without a token stand for no bytes."""

    __slots__ = ("_hidden", "_id_to_token", "_to_bytes")

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        to_bytes: Callable[[str], bytes],
        hidden: frozenset[int],
    ) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._id_to_token = id_to_token
        self._to_bytes = to_bytes
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)
        if token is None:
            return b""
        value = self[token_id] = self._to_bytes(token)
        return value

    def token(self, token_id: int) -> str | None:
        """The token that takes part in decoding; None if it is hidden or there is none."""
        return None if token_id in self._hidden else self._id_to_token(token_id)


class TokenCodec(msgspec.Struct, frozen=True):
    """Decodes token by token. `visible` holds every token; in `shown`, special tokens stand for no bytes."""

    visible: TokenBytes
    shown: TokenBytes
    errors: str
    """Codec error handler for ill-formed UTF-8."""
    leading_space: LeadingSpace
    mark: str
    """What a space looks like inside a token; only where spaces are dropped from the first token."""

    def table(self, skip_special_tokens: bool) -> TokenBytes:
        """The bytes of each token, with or without special tokens."""
        return self.shown if skip_special_tokens else self.visible

    def begins_text(self, token_ids: Iterable[int], skip_special_tokens: bool) -> bool:
        """Whether text that follows `token_ids` is still at the beginning, where a space is dropped."""
        table = self.table(skip_special_tokens)
        if self.leading_space is LeadingSpace.DROP_FROM_TEXT:
            return not any(table[token_id] for token_id in token_ids)
        if self.leading_space is LeadingSpace.DROP_FROM_TOKEN:
            return not any(table.token(token_id) is not None for token_id in token_ids)
        return False

    def stream(self, skip_special_tokens: bool, begins_text: bool) -> "ByteStream":
        """A decoder of one sequence. begins_text: nothing precedes the sequence."""
        return ByteStream(self, self.table(skip_special_tokens), begins_text)


class ByteStream:
    """Incremental UTF-8 decoding of one sequence: incomplete characters wait for the tokens that complete
    them.
    """

    __slots__ = ("_at_start", "_codec", "_decode", "_table")

    def __init__(self, codec: TokenCodec, table: TokenBytes, begins_text: bool) -> None:
        self._codec = codec
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")(codec.errors).decode
        self._at_start = begins_text and codec.leading_space is not LeadingSpace.KEEP

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete."""
        table = self._table
        if self._at_start:
            return self._push_at_start(token_ids)
        if len(token_ids) == 1:
            return self._decode(table[token_ids[0]])
        return self._decode(b"".join([table[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        """The replacement of whatever was left incomplete."""
        return self._decode(b"", True)

    def _push_at_start(self, token_ids: list[int]) -> str:
        table = self._table
        pieces = [table[token_id] for token_id in token_ids]
        if self._codec.leading_space is LeadingSpace.DROP_FROM_TOKEN:
            for i, token_id in enumerate(token_ids):
                if (token := table.token(token_id)) is not None:
                    self._at_start = False
                    pieces[i] = token.replace(self._codec.mark, "").encode()
                    break
            return self._decode(b"".join(pieces))
        text = self._decode(b"".join(pieces))
        if text:
            self._at_start = False
        return text.removeprefix(" ")


def token_codec(backend: Backend, special_ids: frozenset[int]) -> TokenCodec | None:
    """The codec of a tokenizer whose decoder is of a known family, else None."""
    if backend.decoder is None:
        return None
    # __getstate__ is how the library exposes a component's JSON.
    family = _family(msgspec.json.decode(backend.decoder.__getstate__()))
    if family is None:
        return None
    return TokenCodec(
        visible=TokenBytes(backend.id_to_token, family.to_bytes, frozenset()),
        shown=TokenBytes(backend.id_to_token, family.to_bytes, special_ids),
        errors=family.errors,
        leading_space=family.leading_space,
        mark=family.mark,
    )


class _Family(NamedTuple):
    to_bytes: Callable[[str], bytes]
    errors: str
    leading_space: LeadingSpace
    mark: str = ""


def _family(decoder: dict[str, Any]) -> _Family | None:
    match decoder:
        case {"type": "ByteLevel"}:
            return _Family(_byte_level_to_bytes, "replace", LeadingSpace.KEEP)
        case {"type": "Metaspace", "replacement": str(mark)}:
            prepends = decoder.get("prepend_scheme", "always") != "never"
            leading = LeadingSpace.DROP_FROM_TOKEN if prepends else LeadingSpace.KEEP
            return _Family(_metaspace_to_bytes(mark, " ", byte_fallback=False), "replace", leading, mark)
        case {"type": "Sequence", "decoders": list(parts)}:
            return _sequence_family(parts)
    return None


def _sequence_family(parts: list[dict[str, Any]]) -> _Family | None:
    leading_space = LeadingSpace.KEEP
    match parts:
        case [only]:
            return _family(only)
        case [*_, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            leading_space = LeadingSpace.DROP_FROM_TEXT
            parts = parts[:-1]
    match parts:
        case [
            {"type": "Replace", "pattern": {"String": str(mark)}, "content": str(content)},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]:
            to_bytes = _metaspace_to_bytes(mark, content, byte_fallback=True)
            return _Family(to_bytes, REPLACE_EACH_BYTE, leading_space)
    return None


def _metaspace_to_bytes(mark: str, content: str, *, byte_fallback: bool) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        if byte_fallback and (match := _FALLBACK_BYTE.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.replace(mark, content).encode()

    return to_bytes


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable alphabet of bytes: itself where Latin-1 prints it, else the next character from
    U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(sorted(set(range(256)) - printable)):
        alphabet[chr(0x100 + i)] = byte
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_to_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[char] for char in token])
    except KeyError:  # an added token, in plain text
        return token.encode()
