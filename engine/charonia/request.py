"""A generation request as the engine sees it: token ids in, token ids out."""

from enum import Enum, auto

import msgspec

from charonia.outputs import FinishReason, TokenLogprobs
from charonia.sampling_params import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One sequence to generate, fully resolved by a frontend. Crosses the process boundary.

    request_id: unique within the engine's life. seed: the sequence's own RNG key. stop_token_ids: tokens that end the
    sequence, with end-of-sequence tokens included unless ignored. bad_words: token sequences never to be completed.
    max_tokens: at least 1. priority: lower runs first (policy "priority"). deadline: on CLOCK_MONOTONIC, in seconds.
    cache_salt: isolates the prefix cache. arrival_time: CLOCK_MONOTONIC, in seconds.
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


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True, omit_defaults=True):
    """What one step brought for one request.

    logprobs: one entry a token of `token_ids`. prompt_logprobs: entries of prompt positions computed in this step, in
    order, beginning at position 1. stop_token_id: the stop token that ended the sequence. error: the message when
    finish_reason is ERROR. num_cached_tokens, scheduled_time (CLOCK_MONOTONIC): set in the request's first delta.
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


class RequestStatus(Enum):
    """Where a request lives in the scheduler."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Request:
    """A live request in the scheduler; outlives the steps that advance it.

    Invariant: `num_computed_tokens <= num_tokens`, where `num_tokens` counts known tokens plus those sampled by steps
    whose results have not been read yet. Progress is `num_computed_tokens` chasing `num_tokens`; there are no phases.
    """

    __slots__ = (
        "block_hashes", "block_ids", "data", "last_step_id", "num_cached_tokens", "num_computed_tokens",
        "num_pending_tokens", "num_preemptions", "num_prompt_logprobs", "num_published_blocks", "order",
        "row", "scheduled_time", "status", "stop_token_ids", "token_ids",
    )  # fmt: skip

    def __init__(self, data: EngineRequest) -> None:
        self.data = data
        self.stop_token_ids = frozenset(data.stop_token_ids)
        self.token_ids: list[int] = list(data.prompt_token_ids)
        self.num_computed_tokens = 0
        """Tokens whose keys and values are computed, or will be once every launched step has run."""
        self.num_pending_tokens = 0
        """Tokens sampled by launched steps whose results have not been read."""
        self.status = RequestStatus.WAITING
        self.row: int | None = None
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

    @property
    def request_id(self) -> int:
        """The engine-wide id."""
        return self.data.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.data.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and those on their way."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.status is RequestStatus.FINISHED
