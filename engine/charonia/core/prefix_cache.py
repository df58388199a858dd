"""Content hashes of KV-cache blocks, and the map from hash to block."""

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes
"""128-bit keyed BLAKE2b over the parent's hash and the block's tokens."""

HASH_BYTES = 16


class BlockHasher:
    """Chains block hashes: a hash stands for the whole prefix that ends with its block.

    The key is drawn per engine, so that no client can prepare collisions. Everything besides the tokens that the
    keys and values depend on (adapter identity, weights, the tenant's salt) belongs in the root.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._key = secrets.token_bytes(32)
        self._plain_root = self._root("", "")

    def _root(self, adapter: str, salt: str) -> BlockHash:
        """The parent of a sequence's first block."""
        # Lengths delimit the fields, so that no two pairs share an encoding.
        parts = [part.encode("utf-8", "surrogatepass") for part in (adapter, salt)]
        data = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return blake2b(data, digest_size=HASH_BYTES, key=self._key, person=b"root").digest()

    def extend(
        self, hashes: list[BlockHash], token_ids: Sequence[int], *, adapter: str = "", salt: str = ""
    ) -> None:
        """Append the hashes of all full blocks of `token_ids` that `hashes` does not hold yet."""
        size = self._block_size
        begin, end = len(hashes) * size, len(token_ids) // size * size
        if begin >= end:
            return
        parent = self._plain_root
        if hashes:
            parent = hashes[-1]
        elif adapter or salt:
            parent = self._root(adapter, salt)
        data = array("i", token_ids[begin:end]).tobytes()
        step, key = len(data) // (end - begin) * size, self._key
        for start in range(0, len(data), step):
            parent = blake2b(parent + data[start : start + step], digest_size=HASH_BYTES, key=key).digest()
            hashes.append(parent)


class PrefixCache:
    """Block ids by content hash."""

    def __init__(self) -> None:
        self._by_hash: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def longest(self, hashes: Sequence[BlockHash], limit: int) -> list[int]:
        """Block ids of the longest cached prefix of `hashes`, at most `limit` blocks."""
        found: list[int] = []
        for block_hash in hashes[:limit]:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def add(self, block_hash: BlockHash, block_id: int) -> bool:
        """Record a block; False when the content is known already."""
        return self._by_hash.setdefault(block_hash, block_id) == block_id

    def discard(self, block_hash: BlockHash) -> None:
        """Forget a block."""
        del self._by_hash[block_hash]
