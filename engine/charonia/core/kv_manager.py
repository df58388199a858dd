"""Who owns which KV-cache blocks, and when they may be used again."""

from collections import deque

from charonia.config import SchedulerConfig
from charonia.core.block_pool import BlockPool
from charonia.core.prefix_cache import BlockHasher
from charonia.request import Request


class KVManager:
    """Gives blocks to requests and takes them back.

    Invariant: a block returns to the pool only after the last launched step that can touch it has completed. Blocks
    of a request that leaves while a step of its is in flight wait in `_deferred` until then.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._pool = BlockPool(config.num_blocks)
        self._hasher = BlockHasher(config.block_size)
        self._deferred: deque[tuple[int, list[int]]] = deque()
        self._num_deferred = 0
        self._completed_step = -1
        self._next_admission = 0
        self.prefix_queries = 0
        """Prompt tokens looked up in the prefix cache."""
        self.prefix_hits = 0
        """Prompt tokens found there."""

    @property
    def num_free(self) -> int:
        """Blocks that can be had now."""
        return self._pool.num_free

    @property
    def num_reclaimable(self) -> int:
        """Blocks that can be had once every step in flight has completed."""
        return self._pool.num_free + self._num_deferred

    @property
    def num_usable(self) -> int:
        """Blocks in all."""
        return self._pool.num_usable

    @property
    def num_used(self) -> int:
        """Blocks that requests or steps in flight hold."""
        return self._pool.num_usable - self._pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self._block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """Block ids of the longest cached prefix; at least one token is always left to compute."""
        data = request.data
        if not self._caching or data.sampling.prompt_logprobs is not None:
            return []
        if data.pooling is not None and data.pooling.pooling_type != "last":
            # What is pooled has to be computed.
            return []
        self._extend_hashes(request)
        limit = (len(request.token_ids) - 1) // self._block_size
        return self._pool.prefix_cache.longest(request.block_hashes, limit)

    def num_free_beside(self, prefix: list[int]) -> int:
        """Free blocks that remain once the blocks of `prefix` are taken."""
        return self._pool.num_free - sum(self._pool.is_free(block_id) for block_id in prefix)

    def next_event(self, request: Request) -> int:
        """The number of computed tokens at which the request next fills a block, or needs one that it lacks."""
        computed, size = request.num_computed_tokens, self._block_size
        if computed == len(request.block_ids) * size:
            return computed + 1
        return (computed // size + 1) * size

    def next_full_block(self, request: Request) -> int:
        """The number of known tokens at which the request next fills a block."""
        return (len(request.token_ids) // self._block_size + 1) * self._block_size

    def num_sharers(self, block_id: int) -> int:
        """How many requests hold the block, those included that have left while a step of theirs is in flight."""
        return self._pool.ref_counts[block_id]

    def admit(self, request: Request, prefix: list[int]) -> None:
        """Start a request on its cached prefix."""
        self._pool.share(prefix)
        request.block_ids = list(prefix)
        request.num_computed_tokens = len(prefix) * self._block_size
        request.admission, self._next_admission = self._next_admission, self._next_admission + 1
        request.common_with = -1
        if request.num_preemptions == 0 and self._caching:
            self.prefix_queries += len(request.token_ids)
            self.prefix_hits += request.num_computed_tokens

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make room for the request's first `num_tokens` tokens; the new block ids, or None when there are too few."""
        missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return []
        if missing > self._pool.num_free:
            return None
        new = self._pool.take(missing)
        request.block_ids.extend(new)
        return new

    def publish(self, request: Request) -> None:
        """Offer the request's full blocks, whose tokens are known and computed, to others."""
        if not self._caching:
            return
        full = min(request.num_computed_tokens, len(request.token_ids)) // self._block_size
        if full <= request.num_published_blocks:
            return
        self._extend_hashes(request)
        for i in range(request.num_published_blocks, full):
            self._pool.publish(request.block_ids[i], request.block_hashes[i])
        request.num_published_blocks = full

    def unpublish(self, request: Request) -> None:
        """Hide the request's blocks: their content is not to be trusted."""
        self._pool.unpublish(request.block_ids)

    def release(self, request: Request) -> None:
        """Take all blocks back, now or when the last step that can touch them completes."""
        blocks, request.block_ids = request.block_ids, []
        request.num_published_blocks = 0
        request.num_computed_tokens = 0
        if request.last_step_id <= self._completed_step:
            self._pool.release(blocks)
        elif blocks:
            self._deferred.append((request.last_step_id, blocks))
            self._num_deferred += len(blocks)

    def complete(self, step_id: int) -> None:
        """Note that every step up to `step_id` has completed on the device."""
        self._completed_step = step_id
        if not self._deferred:
            return
        # Steps complete in order, but requests are released in any order: look at all that wait, a handful at most.
        for _ in range(len(self._deferred)):
            last_step, blocks = self._deferred.popleft()
            if last_step <= step_id:
                self._num_deferred -= len(blocks)
                self._pool.release(blocks)
            else:
                self._deferred.append((last_step, blocks))

    def _extend_hashes(self, request: Request) -> None:
        self._hasher.extend(request.block_hashes, request.token_ids, salt=request.data.cache_salt)
