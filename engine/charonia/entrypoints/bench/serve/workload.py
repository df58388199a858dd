"""What is asked: random token ids of exact lengths, or the lines of a file."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from charonia.errors import ConfigError

_TEXT = """
    the of and to in that is was for on are as with they at be this have from one had by word but not what all were
    when your can said there use each which she do how their if will up other about out many then them these so some
    her would make like him into time has look two more write go see number no way could people my than first water
    been call who its now find long down day did get come made may part over new sound take only little work know
    place year live me back give most very after thing our just name good sentence man think say great where help
"""
_WORDS = _TEXT.split()
"""Common words, a token each for the usual tokenisers: chat messages cannot be token ids."""


@dataclass(frozen=True, slots=True, eq=False)
class BenchRequest:
    """One request: token ids, or a text, or chat messages."""

    max_tokens: int
    token_ids: npt.NDArray[np.int32] | None = None
    text: str | None = None
    messages: Sequence[dict[str, Any]] | None = None

    @property
    def prompt_tokens(self) -> int:
        """As far as it is known without a tokeniser; 0 otherwise."""
        return 0 if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RandomWorkload:
    """Prompts of random token ids.

    input_len, output_len: tokens; with a range_ratio r they are drawn evenly from [(1 - r) len, (1 + r) len].
    prefix_len: tokens in front of those, the same for all prompts of one of `num_prefixes` groups.
    vocab_size: token ids are below it. as_text: words instead of token ids, so that lengths are near, not exact.
    """

    input_len: int
    output_len: int
    range_ratio: float
    prefix_len: int
    num_prefixes: int
    vocab_size: int
    as_text: bool

    def requests(self, rng: np.random.Generator, count: int) -> list[BenchRequest]:
        """As many requests; the generator alone decides which."""
        prefixes = rng.integers(self.vocab_size, size=(self.num_prefixes, self.prefix_len), dtype=np.int32)
        inputs = self._lengths(rng, self.input_len, count)
        outputs = self._lengths(rng, self.output_len, count)
        made = []
        for i in range(count):
            own = rng.integers(self.vocab_size, size=inputs[i], dtype=np.int32)
            ids = np.concatenate([prefixes[i % self.num_prefixes], own])
            made.append(self._request(ids, int(outputs[i])))
        return made

    def _lengths(self, rng: np.random.Generator, length: int, count: int) -> npt.NDArray[np.int64]:
        low, high = length * (1 - self.range_ratio), length * (1 + self.range_ratio)
        low, high = max(1, round(low)), max(1, round(high))
        return rng.integers(low, high, size=count, dtype=np.int64, endpoint=True)

    def _request(self, ids: npt.NDArray[np.int32], max_tokens: int) -> BenchRequest:
        if not self.as_text:
            return BenchRequest(max_tokens, token_ids=ids)
        return BenchRequest(max_tokens, text=" ".join(_WORDS[i % len(_WORDS)] for i in ids.tolist()))


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class DatasetLine(msgspec.Struct):
    """A line of a dataset: one of the four kinds of prompt, and perhaps the length of the answer."""

    prompt: str | None = None
    text_input: str | None = None
    token_ids: list[TokenId] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


class DatasetWorkload:
    """Prompts of a file, in its order, from the beginning again where there are too few.

    Every call goes on where the one before ended, so that later points of a sweep meet prompts that no prefix cache
    knows yet, as long as the file lasts.
    """

    def __init__(self, lines: Sequence[BenchRequest]) -> None:
        self._lines = itertools.cycle(lines)

    @classmethod
    def read(cls, path: Path, default_max_tokens: int) -> "DatasetWorkload":
        """Read JSON lines. Raises `ConfigError` that names the line."""
        try:
            texts = path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"--dataset {path} cannot be read: {error.strerror}") from error
        lines = []
        for number, text in enumerate(texts, 1):
            try:
                if text.strip():
                    lines.append(_request(msgspec.json.decode(text, type=DatasetLine), default_max_tokens))
            except (msgspec.MsgspecError, ValueError) as error:
                raise ConfigError(f"--dataset {path}, line {number}: {error}") from error
        if not lines:
            raise ConfigError(f"--dataset {path} has no lines")
        return cls(lines)

    def requests(self, rng: np.random.Generator, count: int) -> list[BenchRequest]:
        """The next requests of the file; nothing about them is random."""
        return list(itertools.islice(self._lines, count))


Workload = RandomWorkload | DatasetWorkload


def _request(line: DatasetLine, default_max_tokens: int) -> BenchRequest:
    text = line.prompt if line.prompt is not None else line.text_input
    if sum(value is not None for value in (line.prompt, line.text_input, line.token_ids, line.messages)) != 1:
        raise ValueError("give one of prompt, text_input, token_ids and messages")
    max_tokens = default_max_tokens if line.max_tokens is None else line.max_tokens
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    ids = None if line.token_ids is None else np.array(line.token_ids, np.int32)
    return BenchRequest(max_tokens, token_ids=ids, text=text, messages=line.messages)
