"""How a request's constraints on its tokens lie on the device. Plain ints in, plain ints out.

There is a pool of int32 words on the device, of which each request with rules has one stretch, written when it enters a
row. In a step, each rule of each entry of the batch is one record of four int32 that points into the pool:

    record   entry | kind | offset | length
    pool     ... [ ids | value bits ]  [ ids ]  [ mask words ]  [ longest | start, prefix | start, prefix ... | tokens ]
                   BIAS                 EXCLUDE   ALLOW           BAD_WORDS
                                        STOP

BIAS: `length` ids, then as many fp32 bits, which are added. EXCLUDE: `length` ids. STOP: the same, while the output is
shorter than the row's MIN_TOKENS. ALLOW: a bit mask of `length` words, token t in bit t % 32 of word t // 32; tokens
whose bit is 0 or missing are excluded. BAD_WORDS: `length` words of at least two tokens each: where the tokens of one
begin, from `offset`, and how many there are before the last, which is excluded if the others were generated last;
`longest` is the largest such number. A record of kind NONE does nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from charonia_kernels.sampling_params import float_bits

RECORD_WORDS = 4


class RuleKind(IntEnum):
    """What a record's words are."""

    NONE = 0
    BIAS = 1
    EXCLUDE = 2
    STOP = 3
    ALLOW = 4
    BAD_WORDS = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a request. offset: from the beginning of the request's words."""

    kind: RuleKind
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of a request. words: what its stretch of the pool holds, each in the range of an int32."""

    words: list[int]
    rules: list[Rule]

    def records(self, entry: int, base: int) -> list[int]:
        """Records of a step, flat, for the entry whose words begin at `base` in the pool."""
        flat: list[int] = []
        for rule in self.rules:
            flat += (entry, rule.kind, base + rule.offset, rule.length)
        return flat


def build_rules(
    vocab_size: int,
    *,
    bias: Mapping[int, float] | None = None,
    allowed: Iterable[int] | None = None,
    bad_words: Iterable[Sequence[int]] = (),
    stop_ids: Sequence[int] = (),
) -> RuleSet:
    """Lay out the rules of a request. Raises `ValueError` for ids outside the vocabulary and for empty words.

    allowed: all tokens if None. stop_ids: excluded until the row's MIN_TOKENS are out; leave them away if that is 0.
    """
    words: list[int] = []
    rules: list[Rule] = []

    def add(kind: RuleKind, content: Sequence[int], length: int) -> None:
        if length:
            rules.append(Rule(kind, len(words), length))
            words.extend(content)

    bad = [list(word) for word in bad_words]
    mask = None if allowed is None else list(allowed)
    _check_ids(vocab_size, bias or (), mask or (), stop_ids, *bad)
    if not all(bad):
        raise ValueError("a bad word is empty")
    if bias:
        add(RuleKind.BIAS, [*bias, *map(float_bits, bias.values())], len(bias))
    single = [word[0] for word in bad if len(word) == 1]
    add(RuleKind.EXCLUDE, single, len(single))
    add(RuleKind.STOP, stop_ids, len(stop_ids))
    if mask is not None:
        bits = bit_mask(vocab_size, mask)
        add(RuleKind.ALLOW, bits, len(bits))
    phrases = [word for word in bad if len(word) > 1]
    add(RuleKind.BAD_WORDS, _bad_words(phrases), len(phrases))
    return RuleSet(words, rules)


def bit_mask(vocab_size: int, allowed: Iterable[int]) -> list[int]:
    """The words of an ALLOW mask."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[np.fromiter(allowed, np.int64)] = True
    words: list[int] = np.packbits(bits, bitorder="little").view("<i4").tolist()
    return words


def _bad_words(words: list[list[int]]) -> list[int]:
    head, tokens = [max((len(word) - 1 for word in words), default=0)], list[int]()
    for word in words:
        head += (1 + 2 * len(words) + len(tokens), len(word) - 1)
        tokens += word
    return head + tokens


def _check_ids(vocab_size: int, *lists: Iterable[int]) -> None:
    for ids in filter(None, map(list, lists)):
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")
