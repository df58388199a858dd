"""A step in the making, and the memory of steps in flight."""

from dataclasses import dataclass

from charonia.core.step import BlockDelta, NewRow, ScheduledRequest
from charonia.request import Request


@dataclass(frozen=True, slots=True)
class Share:
    """One request's share of a step in flight; `start` is the position of its first token."""

    request: Request
    item: ScheduledRequest
    start: int


@dataclass(frozen=True, slots=True)
class Launched:
    """A step in flight, with the requests behind its rows."""

    step_id: int
    shares: list[Share]


class StepBuilder:
    """Gathers one step's plan."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.num_long = 0
        self.new_rows: list[NewRow] = []
        self.block_deltas: list[BlockDelta] = []
        self._decodes: list[Share] = []
        self._prefills: list[Share] = []

    def advance(self, request: Request, num_tokens: int) -> None:
        """Move a request on by `num_tokens`; its blocks are there already."""
        assert request.row is not None
        samples = request.num_computed_tokens + num_tokens == request.num_tokens
        item = ScheduledRequest(row=request.row, num_tokens=num_tokens, samples=samples)
        (self._decodes if num_tokens == 1 else self._prefills).append(
            Share(request, item, request.num_computed_tokens)
        )
        request.last_step_id = self.step_id
        request.num_computed_tokens += num_tokens
        if samples:
            request.num_pending_tokens += 1
        self.budget -= num_tokens

    def holds(self, request: Request) -> bool:
        """Whether the step advances the request."""
        return request.last_step_id == self.step_id

    @property
    def shares(self) -> list[Share]:
        """All scheduled rows, single tokens first."""
        return self._decodes + self._prefills
