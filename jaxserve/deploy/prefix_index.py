"""`PrefixIndex`: which replica has which KV blocks, as far as the requests sent to it tell, and whom to ask first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from hashlib import blake2b

from jaxserve.cache.prefix_cache import chain_hashes, root_hash

HASH_BYTES = 8  # of each block's hash; a collision costs a hit, no more
MIN_MATCH_SHARE = 0.1  # of a prompt's blocks; a chat template's first words are no reason to crowd one replica


def prompt_hashes(token_ids: list[int], block_size: int, cache_salt: str | None) -> bytes:
    """The chained hashes of a prompt's blocks that a prefix cache could hold, `HASH_BYTES` each, one after the other.

    >>> long, short = (prompt_hashes(list(range(n)), 16, None) for n in (64, 33))
    >>> len(long), len(short), long.startswith(short)
    (24, 16, True)
    """
    num_tokens = (len(token_ids) - 1) // block_size * block_size  # without the last token, which is always computed
    hashes = chain_hashes(root_hash(None, cache_salt), token_ids[:num_tokens], block_size)
    return b"".join(block_hash[:HASH_BYTES] for block_hash in hashes)


def split_hashes(hashes: bytes) -> list[bytes]:
    """The single hashes of `prompt_hashes`."""
    return [hashes[offset : offset + HASH_BYTES] for offset in range(0, len(hashes), HASH_BYTES)]


class PrefixIndex:
    """Guesses each replica's prefix cache: its last used blocks, as many as it has.

    Generated tokens are not in it: the next prompt of a conversation finds its replica by the last prompt's blocks.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}  # by replica, the least recently used first
        self._capacities: dict[str, int] = {}  # blocks
        self._holders: dict[bytes, set[str]] = {}

    def set_replicas(self, capacities: Mapping[str, int]) -> None:
        """Keep these replicas alone; the numbers are the blocks of their pools."""
        for replica in self._capacities.keys() - capacities.keys():
            self.forget(replica)
            del self._blocks[replica]
        self._capacities = dict(capacities)
        for replica in capacities:
            self._blocks.setdefault(replica, OrderedDict())

    def num_blocks(self, replica: str) -> int:
        """Blocks that the replica is thought to hold."""
        return len(self._blocks.get(replica, ()))

    def insert(self, replica: str, hashes: list[bytes]) -> None:
        """Note that the replica computes, or uses, these blocks of one prompt."""
        blocks = self._blocks.get(replica)
        if blocks is None:  # it went away meanwhile
            return
        for block_hash in reversed(hashes):  # so that of one prompt the last block is dropped first
            blocks[block_hash] = None
            blocks.move_to_end(block_hash)
            self._holders.setdefault(block_hash, set()).add(replica)
        while len(blocks) > self._capacities[replica]:
            self._drop(replica, blocks.popitem(last=False)[0])

    def match(self, hashes: list[bytes], replicas: Collection[str]) -> dict[str, int]:
        """How many of a prompt's blocks each replica holds, from the first one on."""
        matched = dict.fromkeys(replicas, 0)
        holding = set(replicas)
        for num_matched, block_hash in enumerate(hashes, start=1):
            holding = holding & self._holders.get(block_hash, set())
            if not holding:
                break
            for replica in holding:
                matched[replica] = num_matched
        return matched

    def forget(self, replica: str) -> None:
        """The replica's cache is empty."""
        for block_hash in self._blocks.get(replica, ()):
            self._drop(replica, block_hash)
        if replica in self._blocks:
            self._blocks[replica].clear()

    def order(self, hashes: list[bytes], loads: Mapping[str, int], max_load_difference: int) -> list[str]:
        """Replicas, the one to ask first first. `loads` are requests under way.

        The longest cached prefix wins where it is worth it and its holder has at most `max_load_difference` requests
        more than the least loaded replica; then least load, fewest blocks, and a hash of the prompt's beginning, which
        is the same in every process that routes.
        """
        least = min(loads.values(), default=0)
        matched = self.match(hashes, loads)

        def place(replica: str) -> tuple[int, int, int, bytes]:
            load, num_matched = loads[replica], matched[replica]
            is_worth_it = num_matched and num_matched >= MIN_MATCH_SHARE * len(hashes)
            if not is_worth_it or load - least > max_load_difference:
                num_matched = 0
            tie = blake2b(replica.encode() + b"".join(hashes[:1]), digest_size=8).digest()
            return -num_matched, load, self.num_blocks(replica), tie

        return sorted(loads, key=place)

    def _drop(self, replica: str, block_hash: bytes) -> None:
        holders = self._holders[block_hash]
        holders.discard(replica)
        if not holders:
            del self._holders[block_hash]
