"""The leading KV-cache blocks that all rows of a step share, so that attention may read them once."""

from charonia.core.kv_manager import KVManager
from charonia.core.step_builder import StepBuilder
from charonia.request import Request


class CommonPrefix:
    """Finds the common prefix of each step. Costs next to nothing while nothing is shared, or nothing changes.

    How many blocks a request shares with another is settled when the later of the two is admitted, so it is worked out
    once for each request and its step's first one.
    """

    def __init__(self, kv: KVManager, block_size: int) -> None:
        self._kv = kv
        self._block_size = block_size
        self._settled: tuple[int, int] | None = None
        self._num_blocks = 0

    def num_blocks(self, step: StepBuilder, running_version: int) -> int:
        """Blocks that all rows of the step share and that hold no token of it; 0 for a single row.

        running_version: changes with the set of running requests.
        """
        # With the same rows, all of them decoding, positions only move away from the prefix.
        state = None if step.chunked else (running_version, len(step.decodes))
        if state is None or state != self._settled:
            self._num_blocks = self._find(step)
            self._settled = state
        return self._num_blocks

    def _find(self, step: StepBuilder) -> int:
        requests = step.decodes + step.chunked
        leader = requests[0]
        if len(requests) < 2 or self._kv.num_sharers(leader.block_ids[0]) < len(requests):
            return 0
        found = len(leader.block_ids)
        for request in requests[1:]:
            if request.common_with != leader.admission:
                request.common_with = leader.admission
                request.num_common_blocks = _num_equal(leader, request)
            found = min(found, request.num_common_blocks)
        first = min(
            min(step.starts, default=leader.num_tokens),
            min((request.num_computed_tokens for request in step.decodes), default=leader.num_tokens) - 1,
        )
        return min(found, first // self._block_size)


def _num_equal(a: Request, b: Request) -> int:
    count = 0
    for left, right in zip(a.block_ids, b.block_ids, strict=False):
        if left != right:
            break
        count += 1
    return count
