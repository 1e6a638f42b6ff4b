"""`PrefixCache`: finds blocks whose K and V another request has computed, by chained hashes of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from struct import Struct

from jaxserve.cache.block_pool import BlockPool, IntegrityError
from jaxserve.request import Request

HASH_BYTES = 32  # as fast as 16, and nobody can look for two prompts that collide


class PrefixCache:
    """Maps the hash of a full block, and of all before it, to the block that holds it. Owned by the scheduler.

    # tokens   0 ....... 15 | 16 ...... 31 | 32 .. 40
    # hash     h0           | h1 = H(h0, tokens 16..31) | none: not full
    # h0 = H(H(adapter, cache_salt), tokens 0..15)

    A block may be inserted as soon as the step that computes it is planned: the device runs steps in order, and within
    a step it writes the K and V of all rows before any row reads them. Two blocks may hold the same content (two
    requests computed it side by side); the first one inserted is found, and block tables are never rewritten.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self.num_queried_tokens = 0  # counter
        self.num_hit_tokens = 0  # counter
        self._pool = block_pool
        self._block_ids: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}  # by block id, the inverse
        block_pool.on_evict = self._on_evict

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._block_ids)

    def match(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix, in order; without the last token, which must be computed."""
        num_blocks = (len(request.token_ids) - 1) // self._pool.block_size
        extend_block_hashes(request, num_blocks, self._pool.block_size)
        found: list[int] = []
        for block_hash in request.block_hashes[:num_blocks]:
            block_id = self._block_ids.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def count(self, *, num_queried_tokens: int, num_hit_tokens: int) -> None:
        """Add a request's first lookup to the counters; lookups that repeat it are not counted."""
        self.num_queried_tokens += num_queried_tokens
        self.num_hit_tokens += num_hit_tokens

    def insert(self, request: Request, first: int, last: int) -> None:
        """Let blocks first .. last - 1 of a request's table be found: full of known tokens, their step planned."""
        extend_block_hashes(request, last, self._pool.block_size)
        for index in range(first, last):
            block_hash, block_id = request.block_hashes[index], request.block_ids[index]
            if block_hash not in self._block_ids:
                self._block_ids[block_hash] = block_id
                self._hashes[block_id] = block_hash
                self._pool.keep(block_id)

    def forget(self, block_hashes: Iterable[bytes]) -> None:
        """No longer find blocks by these hashes; their owners keep them."""
        for block_hash in block_hashes:
            block_id = self._block_ids.pop(block_hash, None)
            if block_id is not None:
                del self._hashes[block_id]
                self._pool.discard(block_id)

    def reset(self) -> None:
        """Forget every block; requests that run keep theirs."""
        self.forget(list(self._block_ids))

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless both maps say the same."""
        if {block_id: block_hash for block_hash, block_id in self._block_ids.items()} != self._hashes:
            raise IntegrityError(f"prefix cache: {len(self._block_ids)} hashes and {len(self._hashes)} blocks disagree")

    def _on_evict(self, block_id: int) -> None:
        del self._block_ids[self._hashes.pop(block_id)]


def extend_block_hashes(request: Request, num_blocks: int, block_size: int) -> None:
    """Hash the request's blocks as far as `num_blocks`; each is hashed once in a request's life."""
    hashes = request.block_hashes
    if num_blocks <= len(hashes):
        return
    parent = hashes[-1] if hashes else root_hash(request.adapter, request.cache_salt)
    first = len(hashes) * block_size
    hashes.extend(chain_hashes(parent, request.token_ids[first : num_blocks * block_size], block_size))


def chain_hashes(parent: bytes, token_ids: list[int], block_size: int) -> Iterator[bytes]:
    """The hash of each block of `token_ids`, whose number `block_size` divides; `parent` is that of what comes before.

    >>> first, second = chain_hashes(b"", [1, 2, 3, 4], 2)
    >>> list(chain_hashes(first, [3, 4], 2)) == [second]
    True
    """
    to_bytes = Struct(f"{block_size}i").pack  # four times as fast as an `array`
    for first in range(0, len(token_ids), block_size):
        content = to_bytes(*token_ids[first : first + block_size])
        parent = blake2b(parent + content, digest_size=HASH_BYTES).digest()
        yield parent


def root_hash(adapter: str | None, cache_salt: str | None) -> bytes:
    """What the first block's hash starts from: requests share blocks only under the same adapter and salt.

    >>> root_hash(None, "tenant-1") == root_hash("tenant-1", None)
    False
    """
    return blake2b(repr((adapter, cache_salt)).encode(), digest_size=HASH_BYTES).digest()
