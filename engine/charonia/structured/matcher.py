"""Follows one sequence through its grammar, and computes which tokens may come next."""

from collections.abc import Collection, Sequence
from os import sched_getaffinity

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

MIN_ROWS_IN_PARALLEL = 8
"""Fewer masks are computed before threads have been woken for them."""
MAX_THREADS = 32
_ENDED = frozenset({"NoExtension", "NoExtensionBias", "EndOfSentence"})


class SequenceMatcher:
    """A `charonia.request.Matcher` of llguidance."""

    def __init__(self, matcher: LLMatcher, end_token_ids: frozenset[int], *, origin: int = 0) -> None:
        """origin: masks of matchers that have it in common are not computed at the same time."""
        self.native = matcher
        self.origin = origin
        self.end_token_ids = end_token_ids
        self.complete = False
        self.error: str | None = None

    def accept(self, token_id: int) -> None:
        """Move on by a token; one that the grammar does not allow is an error."""
        self.native.consume_token(token_id)
        self.note_state()

    def rollback(self, num_tokens: int) -> None:
        """Go back by the tokens that were accepted last."""
        self.native.rollback(num_tokens)
        self.complete = False
        self.note_state()

    def note_state(self) -> None:
        """Look whether the grammar has come to its end, or to where it cannot be followed."""
        native = self.native
        if not native.is_stopped():
            return
        if native.is_error() or native.stop_reason() not in _ENDED:
            reason = native.get_error().partition("\n")[0][:200] or native.stop_reason()
            self.error = (
                f"sampling parameter 'structured_outputs': the grammar cannot be followed further: {reason}"
            )
        else:
            self.complete = True


def num_mask_threads() -> int:
    """Threads that compute the masks of a step."""
    return max(1, min(MAX_THREADS, len(sched_getaffinity(0)) * 3 // 4))


class MaskFiller:
    """Computes the masks of a step. words_per_row: of the vocabulary that the matchers' tokenizer has."""

    def __init__(self, words_per_row: int) -> None:
        self.words_per_row = words_per_row
        self._masks = np.zeros((0, words_per_row), np.int32)
        self._executor = LLExecutor(num_mask_threads())

    def fill(
        self, matchers: Sequence[SequenceMatcher], suppressed: Sequence[Collection[int]]
    ) -> npt.NDArray[np.int32]:
        """[len(matchers), words_per_row] int32, valid until the next call.

        suppressed: as in `charonia.core.constraints.GrammarBackend`.
        """
        count, width = len(matchers), self.words_per_row
        if count > len(self._masks):
            self._masks = np.zeros((2 * count, width), np.int32)
        masks = self._masks[:count]
        address, row_bytes = masks.ctypes.data, width * 4
        if count >= MIN_ROWS_IN_PARALLEL:
            # Threads take neighbours: those that would wait for one another come together.
            order = sorted(range(count), key=lambda i: matchers[i].origin)
            rows = [(matchers[i].native, i) for i in order]
            self._executor.unsafe_compute_mask_ptr(rows, address, row_bytes, count)
        else:
            for i, matcher in enumerate(matchers):
                matcher.native.unsafe_compute_mask_ptr(address + i * row_bytes, row_bytes)
        for matcher, mask, tokens in zip(matchers, masks, suppressed, strict=True):
            matcher.note_state()
            if tokens:
                _suppress(mask, tokens)
        return masks


def _suppress(mask: npt.NDArray[np.int32], tokens: Collection[int]) -> None:
    """Take tokens out of a mask, unless that would leave nothing. mask: [W] int32."""
    words = mask.view(np.uint32)
    before = {token // 32: words[token // 32] for token in tokens if token // 32 < len(words)}
    for token in tokens:
        if token // 32 in before:
            words[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    if not words.any():
        for index, word in before.items():
            words[index] = word
