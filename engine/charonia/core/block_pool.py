"""KV-cache blocks: reference counts, and an O(1) LRU free list."""

from charonia.core.prefix_cache import BlockHash, PrefixCache

NULL_BLOCK = 0
"""Block 0 belongs to nobody: padding rows read and write it."""


class Block:
    """One block of the KV cache. Free blocks are linked, least recently used first.

    A free block keeps its `hash`, and with it its place in the prefix cache, until it is taken for other content.
    """

    __slots__ = ("block_id", "hash", "next", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.hash: BlockHash | None = None
        self.prev: Block | None = None
        self.next: Block | None = None


class FreeList:
    """Doubly linked list of free blocks between two sentinels; every operation is O(1)."""

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-1)
        self._head.next = self._tail
        self._tail.prev = self._head
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, block: Block) -> None:
        """Add as most recently used."""
        last = self._tail.prev
        assert last is not None
        last.next = block
        block.prev, block.next = last, self._tail
        self._tail.prev = block
        self._size += 1

    def remove(self, block: Block) -> None:
        """Take a given block out."""
        assert block.prev is not None and block.next is not None
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self._size -= 1

    def pop_oldest(self) -> Block:
        """Take the least recently used block out; the list must not be empty."""
        block = self._head.next
        assert block is not None and block is not self._tail
        self.remove(block)
        return block


class BlockPool:
    """All blocks of one KV cache. A block is free when nobody references it."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free = FreeList()
        self.prefix_cache = PrefixCache()
        for block in self._blocks[NULL_BLOCK + 1 :]:
            self._free.append(block)

    @property
    def num_free(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return len(self._blocks) - 1

    def take(self, count: int) -> list[int]:
        """Take `count <= num_free` blocks, evicting the least recently used from the prefix cache."""
        taken: list[int] = []
        for _ in range(count):
            block = self._free.pop_oldest()
            self._forget(block)
            block.ref_count = 1
            taken.append(block.block_id)
        return taken

    def is_free(self, block_id: int) -> bool:
        """Whether nobody references the block."""
        return self._blocks[block_id].ref_count == 0

    def share(self, block_ids: list[int]) -> None:
        """Take one more reference to each block of a cached prefix."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                self._free.remove(block)
            block.ref_count += 1

    def release(self, block_ids: list[int]) -> None:
        """Drop one reference to each block. The last of the list is evicted first: a prefix outlives its tail."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} released twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free.append(block)

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """Make a full block findable. The first block with a given content wins."""
        block = self._blocks[block_id]
        if block.hash is None and self.prefix_cache.add(block_hash, block_id):
            block.hash = block_hash

    def unpublish(self, block_ids: list[int]) -> None:
        """Hide blocks whose content is not to be trusted."""
        for block_id in block_ids:
            self._forget(self._blocks[block_id])

    def _forget(self, block: Block) -> None:
        if block.hash is not None:
            self.prefix_cache.discard(block.hash)
            block.hash = None
