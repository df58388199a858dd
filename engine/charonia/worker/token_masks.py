"""A step's token masks, from the host's words to what either sampler applies."""

from dataclasses import dataclass

import numpy as np
import torch
from charonia_kernels.logit_rule_layout import RECORD_WORDS, RuleKind

from charonia.core.step import TokenMasks
from charonia.worker.arena import IntArray


def allowed_tokens(masks: TokenMasks, vocab_size: int) -> dict[int, torch.Tensor]:
    """By row: [V] bool, whether a token is allowed; tokens past the mask are not."""
    allowed: dict[int, torch.Tensor] = {}
    for row, words in zip(masks.rows, _words(masks), strict=True):
        # Masks may cover more tokens than the model has logits for, and fewer.
        bits = np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little")
        allowed[row] = torch.from_numpy(bits.view(np.bool_))
    return allowed


@dataclass(frozen=True, slots=True)
class MaskRecords:
    """Masks as `apply_logit_rules` takes them. records: [M, RECORD_WORDS] int32. words: [M * W] int32, the pool."""

    records: torch.Tensor
    words: torch.Tensor

    @classmethod
    def send(
        cls, masks: TokenMasks, rows: IntArray, vocab_size: int, device: torch.device
    ) -> "MaskRecords | None":
        """Copy the masks of a step to the device, all in one; None if there are none. rows: of the step's entries."""
        count, width = len(masks.rows), masks.words_per_row
        if not count:
            return None
        entries = {row: entry for entry, row in enumerate(rows.tolist())}
        length = min(width, -(-vocab_size // 32))
        head = count * RECORD_WORDS
        staged = torch.empty(head + count * width, dtype=torch.int32, pin_memory=device.type == "cuda")
        host = staged.numpy()
        records = [(entries[row], RuleKind.ALLOW, i * width, length) for i, row in enumerate(masks.rows)]
        host[:head] = np.array(records, np.int32).reshape(-1)
        host[head:] = _words(masks).reshape(-1)
        sent = staged.to(device, non_blocking=True)
        return cls(sent[:head].view(count, RECORD_WORDS), sent[head:])


def _words(masks: TokenMasks) -> IntArray:
    """[M, W] int32."""
    return np.frombuffer(masks.words, np.int32).reshape(len(masks.rows), masks.words_per_row)
