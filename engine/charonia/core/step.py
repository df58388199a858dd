"""The two messages between the scheduler and the device: what a step does, and what it brought."""

from dataclasses import dataclass

import msgspec

from charonia.outputs import TokenLogprobs
from charonia.pooling_params import PoolingParams
from charonia.sampling_params import SamplingParams


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A request enters a row (first time, or again after preemption): its whole state, sent once.

    token_ids: prompt and any output so far. block_ids: its block table. num_computed_tokens: cached prefix length.
    stop_token_ids: suppressed by the sampler while fewer than `sampling.min_tokens` tokens are out.
    bad_words: token sequences whose last token is suppressed when the others have just been generated.
    pooling: the row never samples; once its whole prompt is computed, the step brings its embedding.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]
    num_computed_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: list[int]
    bad_words: list[list[int]]
    pooling: PoolingParams | None = None


class BlockDelta(msgspec.Struct, frozen=True, array_like=True):
    """Blocks appended to a row's block table."""

    row: int
    block_ids: list[int]


class ScheduledRequest(msgspec.Struct, frozen=True, array_like=True):
    """One row's share of a step: `num_tokens` tokens from its position on; `samples` when they reach its last token."""

    row: int
    num_tokens: int
    samples: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """A step, as deltas against the rows on the device. Applied in order: freed, new rows, block deltas, scheduled.

    The batch is `decode_rows`, each of which computes one token and samples the next, followed by `chunks`, which are
    all others. num_common_prefix_blocks: leading blocks that all scheduled rows share, and that were computed before
    any token of the step; 0 for a single row. constrained_rows: rows that sample under a grammar; their `TokenMasks`
    are known only after the step before has been read.
    """

    step_id: int
    decode_rows: list[int]
    chunks: list[ScheduledRequest] = []
    new_rows: list[NewRow] = []
    block_deltas: list[BlockDelta] = []
    freed_rows: list[int] = []
    num_common_prefix_blocks: int = 0
    constrained_rows: list[int] = []

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """The whole batch in its order."""
        return [ScheduledRequest(row, 1, True) for row in self.decode_rows] + self.chunks

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode_rows) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_sampled(self) -> int:
        """Tokens that the step samples."""
        return len(self.decode_rows) + sum(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The tokens that a step may draw in its constrained rows.

    words: [len(rows), words_per_row] uint32, little-endian: token t is allowed if bit t % 32 of word t // 32 is set.
    """

    rows: list[int]
    words: memoryview
    words_per_row: int


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step brought.

    token_ids: one sampled token for each scheduled row that samples, in the plan's order. logprobs: by row, of the
    sampled token, for rows that ask. prompt_logprobs: by row, of the prompt tokens that follow the positions computed
    in this step. failed_rows: rows whose logits were not finite. excluded_rows: rows of which every token was
    excluded. The sampled token of either is meaningless. device_seconds: what the step took on the device, where that
    is measured. embeddings: little-endian fp32 values by row, of pooling rows whose prompt has been computed to its
    end.
    """

    step_id: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    failed_rows: list[int] = []
    device_seconds: float | None = None
    embeddings: dict[int, bytes] = {}
    excluded_rows: list[int] = []
