"""`BlockTables`: gives requests the blocks their tokens need, shared ones first, and takes them back."""

from __future__ import annotations

from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.scheduler.scheduled_request import NEVER, ScheduledRequest


class BlockTables:
    """Writes the block fields of requests; nobody else does. Needs no table of its own: they are the requests'."""

    def __init__(self, block_pool: BlockPool, prefix_cache: PrefixCache | None) -> None:
        self._pool = block_pool
        self._cache = prefix_cache
        self._block_size = block_pool.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def admit(self, request: ScheduledRequest, num_reserved: int) -> bool:
        """Blocks for all its known tokens, or nothing and False where fewer than `num_reserved` would stay free."""
        shared = self._match(request)
        num_new = self.blocks_for(len(request.token_ids)) - len(shared)
        if num_new + num_reserved > self._pool.num_free - self._pool.num_free_among(shared):
            return False
        self._pool.touch(shared)
        request.block_ids = shared + self._pool.allocate(num_new)
        request.num_block_tokens = len(request.block_ids) * self._block_size
        request.num_computed_tokens = len(shared) * self._block_size
        if self._cache is not None:
            request.num_cacheable_tokens = request.num_computed_tokens + self._block_size
        if request.num_cached_tokens is None:
            self._count_lookup(request)
        return True

    def grow(self, request: ScheduledRequest, num_tokens: int, num_reserved: int = 0) -> list[int] | None:
        """Blocks to append so that the table holds `num_tokens`; None where fewer than `num_reserved` would be left."""
        num_new = self.blocks_for(num_tokens) - len(request.block_ids)
        if num_new + num_reserved > self._pool.num_free:
            return None
        block_ids = self._pool.allocate(num_new)
        request.block_ids += block_ids
        request.num_block_tokens = len(request.block_ids) * self._block_size
        return block_ids

    def publish(self, request: ScheduledRequest) -> None:
        """Let others share the blocks that are full of known tokens whose computation is planned."""
        if self._cache is None:
            return
        first = request.num_cacheable_tokens // self._block_size - 1
        last = min(request.num_computed_tokens, len(request.token_ids)) // self._block_size
        if last > first:
            self._cache.insert(request, first, last)
            request.num_cacheable_tokens = (last + 1) * self._block_size

    def release(self, request: ScheduledRequest) -> None:
        """Take all its blocks back; what they hold can be found until they are given to somebody else."""
        self.publish(request)
        self._pool.free(request.block_ids)
        request.block_ids = []
        request.num_block_tokens = request.num_computed_tokens = 0
        request.num_cacheable_tokens = NEVER

    def forget(self, request: ScheduledRequest) -> None:
        """Its step failed: what its blocks hold, or held before it lost them, is not to be trusted."""
        request.num_cacheable_tokens = NEVER
        if self._cache is not None:
            self._cache.forget(request.block_hashes)

    def _count_lookup(self, request: ScheduledRequest) -> None:
        """Of the first admission only: what a preempted request finds again is its own."""
        request.num_cached_tokens = request.num_computed_tokens
        if self._cache is not None and request.prompt_logprobs is None:
            self._cache.count(
                num_queried_tokens=len(request.prompt_token_ids), num_hit_tokens=request.num_computed_tokens
            )

    def _match(self, request: ScheduledRequest) -> list[int]:
        """Cached blocks it can share; none while it owes prompt logprobs, which need every position computed."""
        if self._cache is None or request.prompt_logprobs is not None:
            return []
        return self._cache.match(request)
