"""A step in the making, and the memory of steps in flight."""

from dataclasses import dataclass

from charonia.core.step import BlockDelta, NewRow, ScheduledRequest, StepPlan
from charonia.request import Request


@dataclass(frozen=True, slots=True)
class Launched:
    """A step in flight, with the requests behind its rows.

    decodes: of `plan.decode_rows`. chunked: of `plan.chunks`. starts: position of each chunk's first token.
    constrained: of `plan.constrained_rows`.
    """

    plan: StepPlan
    decodes: list[Request]
    chunked: list[Request]
    starts: list[int]
    constrained: list[Request]


class StepBuilder:
    """Gathers one step's plan."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.num_long = 0
        self.new_rows: list[NewRow] = []
        self.block_deltas: list[BlockDelta] = []
        self.decodes: list[Request] = []
        self.decode_rows: list[int] = []
        self.chunked: list[Request] = []
        self.starts: list[int] = []
        self.put_off: list[Request] = []
        """Long prefills that advance only if budget is left in the end."""
        self._chunks: list[ScheduledRequest] = []

    def advance(self, request: Request, num_tokens: int) -> None:
        """Move a request on by `num_tokens`; its blocks are there already."""
        start = request.num_computed_tokens
        request.num_computed_tokens = end = start + num_tokens
        request.last_step_id = self.step_id
        samples = end == request.num_tokens and not request.pools
        if samples:
            request.num_tokens += 1
        if samples and num_tokens == 1:
            self.decodes.append(request)
            self.decode_rows.append(request.row)
        else:
            self.chunked.append(request)
            self._chunks.append(ScheduledRequest(request.row, num_tokens, samples))
            self.starts.append(start)
        self.budget -= num_tokens

    def holds(self, request: Request) -> bool:
        """Whether the step advances the request."""
        return request.last_step_id == self.step_id

    def finish(self, freed_rows: list[int], num_common_prefix_blocks: int, constrained: bool) -> Launched:
        """The plan, and what `update` needs to know of it. constrained: whether there are matchers to look for."""
        followers = self._constrained() if constrained else []
        plan = StepPlan(
            self.step_id, self.decode_rows, self._chunks, self.new_rows, self.block_deltas, freed_rows,
            num_common_prefix_blocks, [request.row for request in followers],
        )  # fmt: skip
        return Launched(plan, self.decodes, self.chunked, self.starts, followers)

    def _constrained(self) -> list[Request]:
        """Requests whose next token the step draws under a grammar."""
        followers = [request for request in self.decodes if request.matcher is not None]
        for request, chunk in zip(self.chunked, self._chunks, strict=True):
            if chunk.samples and request.matcher is not None:
                followers.append(request)
        return followers
