"""The order in which requests are served."""

import heapq
from bisect import insort
from collections.abc import Iterator

from charonia.config import SchedulingPolicy
from charonia.request import Request, RequestStatus

OrderKey = tuple[int, int]


def order_key(policy: SchedulingPolicy, request: Request) -> OrderKey:
    """Smaller is served first: by priority if the policy says so, then by arrival."""
    return (request.data.priority if policy == "priority" else 0, request.order)


class WaitingQueue:
    """Heap of waiting requests; those that left in the meantime are dropped when they surface."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[OrderKey, Request]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        """Add a request, new or preempted."""
        heapq.heappush(self._heap, (order_key(self._policy, request), request))
        self._size += 1

    def note_left(self) -> None:
        """Account for a waiting request that has just ended (its status says so already)."""
        self._size -= 1
        if len(self._heap) > 2 * self._size + 64:
            self._heap = [entry for entry in self._heap if entry[1].status is RequestStatus.WAITING]
            heapq.heapify(self._heap)

    def peek(self) -> Request | None:
        """The next request, still in the queue."""
        while self._heap and self._heap[0][1].status is not RequestStatus.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take out the request that `peek` has just shown."""
        self._size -= 1
        return heapq.heappop(self._heap)[1]


class RunningList:
    """Running requests in serving order; the last is the first to be preempted."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._items: list[Request] = []
        self.version = 0
        """Counts the changes."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        """The requests, in order. `last` may be removed meanwhile, nothing else."""
        return iter(self._items)

    def add(self, request: Request) -> None:
        """Insert at the request's place."""
        self.version += 1
        insort(self._items, request, key=lambda item: order_key(self._policy, item))

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self.version += 1
        self._items.remove(request)

    @property
    def last(self) -> Request | None:
        """The request to be preempted first."""
        return self._items[-1] if self._items else None
