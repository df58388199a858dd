"""A request's constraints on its tokens, laid out on the device once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from charonia.core.step import NewRow

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences of which the last token is banned where the others were generated last.

    prefixes: [W, L] int32, all but the last token, aligned right; lengths: [W] int32, how many of them there are.
    last: [W] int64.
    """

    prefixes: torch.Tensor
    lengths: torch.Tensor
    last: torch.Tensor

    @classmethod
    def build(cls, words: Sequence[Sequence[int]], device: torch.device) -> "BadWords":
        """Lay out words of at least two tokens each."""
        width = max(len(word) for word in words) - 1
        padded = [[0] * (width + 1 - len(word)) + list(word[:-1]) for word in words]
        return cls(
            torch.tensor(padded, dtype=torch.int32, device=device),
            torch.tensor([len(word) - 1 for word in words], dtype=torch.int32, device=device),
            torch.tensor([word[-1] for word in words], device=device),
        )

    def ban(self, logits: torch.Tensor, output: torch.Tensor) -> None:
        """Ban in place. logits: [V] fp32. output: [N] int32, the tokens generated so far.

        The comparison stays on the device: the latest token may not have reached the host yet.
        """
        width = min(self.prefixes.shape[1], len(output))
        distance = torch.arange(width, 0, -1, dtype=torch.int32, device=logits.device)
        same = self.prefixes[:, self.prefixes.shape[1] - width :] == output[len(output) - width :]
        matches = (same | (distance > self.lengths[:, None])).all(dim=-1) & (self.lengths <= len(output))
        # Added, so that words with the same last token agree.
        logits.index_add_(0, self.last, torch.where(matches, NEG_INF, 0.0))


@dataclass(frozen=True, slots=True)
class LogitRules:
    """A request's constraints, laid out on the device once.

    additive: [V] fp32, biases, with -inf for tokens that are excluded throughout. None: nothing of the kind.
    """

    additive: torch.Tensor | None
    bad_words: BadWords | None

    @classmethod
    def build(cls, new: NewRow, vocab_size: int, device: torch.device) -> "LogitRules":
        """The rules of a request that enters a row. Its token ids are in the vocabulary."""
        sampling = new.sampling
        banned = [word[0] for word in new.bad_words if len(word) == 1]
        phrases = [word for word in new.bad_words if len(word) > 1]
        additive = None
        if sampling.allowed_token_ids is not None or sampling.logit_bias or banned:
            additive = torch.zeros(vocab_size)
            if sampling.allowed_token_ids is not None:
                additive.fill_(NEG_INF)[sampling.allowed_token_ids] = 0.0
            additive[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
            additive[banned] = NEG_INF
            additive = additive.to(device)
        return cls(additive, BadWords.build(phrases, device) if phrases else None)


NO_RULES = LogitRules(None, None)
