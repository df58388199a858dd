"""A generation request as the engine sees it: token ids in, token ids out."""

from collections.abc import Collection
from enum import Enum, auto
from typing import Protocol

import msgspec

from charonia.outputs import FinishReason, TokenLogprobs
from charonia.pooling_params import PoolingParams
from charonia.sampling_params import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One sequence to generate, or to embed, fully resolved by a frontend. Crosses the process boundary.

    request_id: unique within the engine's life. seed: the sequence's own RNG key. stop_token_ids: tokens that end the
    sequence, with end-of-sequence tokens included unless ignored. bad_words: token sequences never to be completed.
    max_tokens: at least 1. priority: lower runs first (policy "priority"). deadline: on CLOCK_MONOTONIC, in seconds.
    cache_salt: isolates the prefix cache. arrival_time: CLOCK_MONOTONIC, in seconds. pooling: makes it a request for an
    embedding, which generates nothing; `sampling` and what belongs to it are then without effect.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    arrival_time: float
    stop_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    pooling: PoolingParams | None = None


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True, omit_defaults=True, gc=False):
    """What one step brought for one request.

    logprobs: one entry a token of `token_ids`. prompt_logprobs: entries of prompt positions computed in this step, in
    order, beginning at position 1. stop_token_id: the stop token that ended the sequence. error: the message when
    finish_reason is ERROR. num_cached_tokens, scheduled_time (CLOCK_MONOTONIC): set in the request's first delta.
    embedding: little-endian fp32 values, in the only delta of a request for one.
    """

    request_id: int
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_code: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    scheduled_time: float | None = None
    embedding: bytes | None = None


class RequestStatus(Enum):
    """Where a request lives in the scheduler."""

    COMPILING = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Matcher(Protocol):
    """Where one sequence stands in the grammar of its output."""

    @property
    def end_token_ids(self) -> Collection[int]:
        """Tokens that end a sequence; its grammar allows them where the output may end."""

    @property
    def complete(self) -> bool:
        """Whether the output satisfies the grammar and nothing may follow."""

    @property
    def error(self) -> str | None:
        """Why the grammar can be followed no further, if so."""

    def accept(self, token_id: int) -> None:
        """Move on by a token."""

    def rollback(self, num_tokens: int) -> None:
        """Go back by the tokens that were accepted last."""


class Request:
    """A live request in the scheduler; outlives the steps that advance it.

    Invariant: `num_computed_tokens <= num_tokens`, where `num_tokens` counts known tokens plus those sampled by steps
    whose results have not been read yet. Progress is `num_computed_tokens` chasing `num_tokens`; there are no phases.

    `schedule_from` and `update_from` let most decode steps pass with a comparison: below them, nothing can happen but
    that one more token is computed, and that one more token comes.
    """

    __slots__ = (
        "admission", "block_hashes", "block_ids", "common_with", "data", "last_step_id", "matcher", "max_num_tokens",
        "num_cached_tokens", "num_common_blocks", "num_computed_tokens", "num_preemptions", "num_prompt_logprobs",
        "num_prompt_tokens", "num_published_blocks", "num_tokens", "order", "request_id", "row", "schedule_from",
        "scheduled_time", "status", "stop_token_ids", "token_ids", "update_from",
    )  # fmt: skip

    row: int
    """Its row on the device; holds while it runs."""

    def __init__(self, data: EngineRequest) -> None:
        self.data = data
        self.request_id = data.request_id
        self.stop_token_ids = frozenset(data.stop_token_ids)
        self.token_ids: list[int] = list(data.prompt_token_ids)
        """Known tokens."""
        self.num_prompt_tokens = len(self.token_ids)
        self.num_tokens = self.num_prompt_tokens
        """Known tokens, and those sampled by launched steps whose results have not been read."""
        self.max_num_tokens = self.num_prompt_tokens + data.max_tokens
        """Known tokens at which the sequence ends by its length."""
        self.num_computed_tokens = 0
        """Tokens whose keys and values are computed, or will be once every launched step has run."""
        self.status = RequestStatus.WAITING
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_published_blocks = 0
        self.num_prompt_logprobs = 0
        """Prompt positions whose logprobs have been sent."""
        self.last_step_id = -1
        """The last launched step that touches the request's blocks."""
        self.order = 0
        """Arrival order within the engine."""
        self.num_cached_tokens: int | None = None
        self.num_preemptions = 0
        self.scheduled_time: float | None = None
        self.schedule_from = 0
        """Computed tokens from which on a step may need a block, fill one, or be one too many."""
        self.update_from = self.num_prompt_tokens + 1
        """Known tokens from which on a new one may be the first, fill a block, or be the last."""
        self.admission = -1
        """Distinguishes stays in a row; block ids once shared stay shared throughout one."""
        self.common_with = -1
        """The stay (of another request, or its own) that `num_common_blocks` compares with."""
        self.num_common_blocks = 0
        self.matcher: Matcher | None = None
        """Of a constrained request, once its grammar is compiled; it has accepted every known output token."""

    @property
    def pools(self) -> bool:
        """Whether it ends with an embedding of its prompt instead of tokens."""
        return self.data.pooling is not None

    @property
    def excludes_tokens(self) -> bool:
        """Whether anything that it asks for keeps tokens from being drawn."""
        data, sampling = self.data, self.data.sampling
        ends_late = sampling.min_tokens > 0 and bool(data.stop_token_ids)
        listed = sampling.allowed_token_ids is not None or bool(data.bad_words)
        return listed or ends_late or self.matcher is not None

    @property
    def num_tokens_ahead(self) -> int:
        """Known tokens, and the next one if there will be one."""
        return len(self.token_ids) + (not self.pools)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens sampled by launched steps whose results have not been read."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.status is RequestStatus.FINISHED
