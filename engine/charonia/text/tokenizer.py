"""Text to token ids and back. Thread-safe: only caches of pure functions change after construction."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer as Backend

from charonia.errors import InvalidRequestError
from charonia.text.token_bytes import TokenCodec, token_codec
from charonia.text.tokenizer_files import read_tokenizer_files


class Tokenizer:
    """A model's tokenizer, with its special tokens and chat templates."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """special_tokens: text by name (`bos_token`, ...). chat_templates: Jinja source by name."""
        self._backend = backend
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        self.chat_templates: Mapping[str, str] = dict(chat_templates or {})
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        own_eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids: frozenset[int] = eos_token_ids.union(own_eos)
        """Every token that ends a sequence: the tokenizer's and the generation configuration's."""
        added = backend.get_added_tokens_decoder()
        self.added_ids: frozenset[int] = frozenset(added)
        # A token may also be made special after it was added; only decoding tells.
        self.special_ids: frozenset[int] = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special
            or backend.decode([token_id]) != backend.decode([token_id], skip_special_tokens=False)
        )
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        """One more than the greatest token id, added tokens included."""
        self.max_chars_per_token: int = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """No token stands for more characters of a text than this; it may be more than any does."""
        self.codec: TokenCodec | None = token_codec(backend, self.special_ids)
        """How tokens decode one by one; None for the rare decoders that look at their neighbours."""
        self._decoded_tokens: dict[int, str] = {}

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Load from a Hugging Face directory. Raises `ModelLoadError` when files are missing or broken."""
        files = read_tokenizer_files(path)
        return cls(
            files.backend,
            special_tokens=files.special_tokens,
            chat_templates=files.chat_templates,
            eos_token_ids=files.eos_token_ids,
        )

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it become those tokens.

        add_special_tokens: add what the tokenizer puts around a text (often a beginning-of-sequence token).
        Raises `InvalidRequestError` when `text` is no valid Unicode.
        """
        check_text(text, "text")
        # Unlike `encode`, the batch form lets other threads run meanwhile and keeps no character offsets.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of a whole sequence, with transformers' semantics and no clean-up of spaces.

        One exception: where a run of byte-fallback tokens is not well-formed UTF-8, only its ill-formed bytes
        become U+FFFD, not the whole run. spaces_between_special_tokens: when false, and special tokens are
        not skipped, an added token right after another is decoded as if it began a text, so that no space
        comes before it. Ids without a token decode to nothing. Raises `InvalidRequestError` for values that
        can be no token id.
        """
        ids = list(ids)
        if skip_special_tokens or spaces_between_special_tokens:
            return self._decode_segment(ids, skip_special_tokens)
        starts = [
            i + 1 for i, (a, b) in enumerate(pairwise(ids)) if a in self.added_ids and b in self.added_ids
        ]
        bounds = [0, *starts, len(ids)]
        return "".join(self._decode_segment(ids[begin:end], False) for begin, end in pairwise(bounds))

    def _decode_segment(self, ids: list[int], skip_special_tokens: bool) -> str:
        if self.codec is None:
            return self.decode_with_backend(ids, skip_special_tokens)
        stream = self.codec.stream(skip_special_tokens, begins_text=True)
        try:
            return stream.push(ids) + stream.flush()
        except (OverflowError, TypeError):
            raise _bad_token_id(ids) from None

    def decode_with_backend(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Decode with the tokenizer's own decoder, looking at neighbours as it will."""
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise _bad_token_id(ids) from None

    def decode_token(self, token_id: int) -> str:
        """Text of one token as it appears inside a text: with its leading space, special tokens spelt out.

        Bytes that are no whole character show as U+FFFD. Ids without a token give an empty string.
        """
        text = self._decoded_tokens.get(token_id)
        if text is None:
            if self.codec is None:
                text = self.decode_with_backend([token_id], skip_special_tokens=False)
            else:
                text = self.codec.visible[token_id].decode("utf-8", self.codec.errors)
            if 0 <= token_id < self.vocab_size:
                self._decoded_tokens[token_id] = text
        return text

    def token_to_str(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None when there is none of that id."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self._backend.token_to_id(token)

    def validate_ids(self, ids: Iterable[int], name: str = "token ids") -> None:
        """Raise `InvalidRequestError`, naming the field `name`, unless every id is an integer below
        `vocab_size`.
        """
        limit = self.vocab_size
        for position, token_id in enumerate(ids):
            if type(token_id) is not int or not 0 <= token_id < limit:
                raise InvalidRequestError(
                    f"{name}[{position}] must be a token id from 0 to {limit - 1}, got {str(token_id)[:40]}"
                )

    def bad_words_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Token sequences that would spell one of `words`, at the beginning of a text and after a space.

        The form after a space counts only where it is another word of equal length in tokens, as in vLLM.
        Raises `InvalidRequestError` for a word that is no text.
        """
        found: list[list[int]] = []
        for word in words:
            check_text(word, "bad_words")
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            if not bare:
                raise InvalidRequestError(f"'bad_words' entry {word[:40]!r} has no tokens")
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            found.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found.append(spaced)
        return found

    def chat_template(self, *, with_tools: bool = False) -> str | None:
        """Source of the chat template to use; None when the model has none."""
        if with_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        return self.chat_templates.get("default")


def check_text(text: str, name: str) -> None:
    """Raise `InvalidRequestError`, naming the field `name`, unless UTF-8 can express `text`."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name} must be a string, got {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} is no valid Unicode: "
            f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None


def _bad_token_id(ids: Sequence[int]) -> InvalidRequestError:
    culprits = [value for value in ids if type(value) is not int or not 0 <= value < 2**32]
    return InvalidRequestError(
        f"token ids must be integers from 0 to 2**32 - 1, got {str(culprits[:1])[1:41]}"
    )
