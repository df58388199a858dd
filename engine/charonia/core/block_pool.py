"""KV-cache blocks: reference counts, and an O(1) LRU free list."""

from collections import OrderedDict
from collections.abc import Sequence

from charonia.core.prefix_cache import BlockHash, PrefixCache

NULL_BLOCK = 0
"""Block 0 belongs to nobody: padding rows read and write it."""


class BlockPool:
    """All blocks of one KV cache. A block is free when nobody references it.

    A free block keeps its hash, and with it its place in the prefix cache, until it is taken for other content.
    """

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        """References to each block; not to be changed from outside."""
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, num_blocks))
        """Free blocks, least recently used first."""
        self.prefix_cache = PrefixCache()

    @property
    def num_free(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return len(self.ref_counts) - 1

    def take(self, count: int) -> list[int]:
        """Take `count <= num_free` blocks, evicting the least recently used from the prefix cache."""
        pop, ref_counts, hashes = self._free.popitem, self.ref_counts, self._hashes
        taken = [pop(last=False)[0] for _ in range(count)]
        for block_id in taken:
            ref_counts[block_id] = 1
            if hashes[block_id] is not None:
                self._forget(block_id)
        return taken

    def is_free(self, block_id: int) -> bool:
        """Whether nobody references the block."""
        return self.ref_counts[block_id] == 0

    def share(self, block_ids: Sequence[int]) -> None:
        """Take one more reference to each block of a cached prefix."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self._free[block_id]
            self.ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference to each block. The last of the list is evicted first: a prefix outlives its tail."""
        ref_counts, free = self.ref_counts, self._free
        for block_id in reversed(block_ids):
            count = ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} released twice"
            ref_counts[block_id] = count
            if count == 0:
                free[block_id] = None

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """Make a full block findable. The first block with a given content wins."""
        if self._hashes[block_id] is None and self.prefix_cache.add(block_hash, block_id):
            self._hashes[block_id] = block_hash

    def unpublish(self, block_ids: Sequence[int]) -> None:
        """Hide blocks whose content is not to be trusted."""
        for block_id in block_ids:
            self._forget(block_id)

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self.prefix_cache.discard(block_hash)
            self._hashes[block_id] = None
