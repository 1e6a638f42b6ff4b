"""The prefix cache finds what was inserted for the same tokens, adapter and salt, and nothing else."""

from __future__ import annotations

import itertools
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache, extend_block_hashes, root_hash
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make(token_ids: list[int], *, cache_salt: str | None = None, adapter: str | None = None) -> Request:
    return Request(
        request_id="a",
        prompt_token_ids=token_ids,
        sampling_params=SamplingParams(),
        eos_token_ids=frozenset(),
        priority=0,
        arrival_time_s=0.0,
        cache_salt=cache_salt,
        adapter=adapter,
        token_ids=list(token_ids),
    )


def computed(cache: PrefixCache, pool: BlockPool, request: Request) -> Request:
    """A request whose full blocks are all inserted."""
    request.block_ids = pool.allocate(-(-len(request.token_ids) // BLOCK_SIZE))
    cache.insert(request, 0, len(request.token_ids) // BLOCK_SIZE)
    return request


def fresh(num_blocks: int = 64) -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    return PrefixCache(pool), pool


def test_the_longest_common_prefix_of_full_blocks_is_found():
    cache, pool = fresh()
    first = computed(cache, pool, make([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert cache.match(make([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])) == first.block_ids[:2]
    assert cache.match(make([1, 2, 3, 4, 5, 6, 7, 0, 9, 10])) == first.block_ids[:1]
    assert cache.match(make([0, 2, 3, 4, 5, 6, 7, 8, 9, 10])) == []


def test_the_last_token_is_never_found():
    cache, pool = fresh()
    first = computed(cache, pool, make([1, 2, 3, 4, 5, 6, 7, 8]))
    assert cache.match(make([1, 2, 3, 4, 5, 6, 7, 8])) == first.block_ids[:1]


def test_the_same_block_after_other_tokens_is_another_block():
    cache, pool = fresh()
    computed(cache, pool, make([1, 2, 3, 4, 5, 6, 7, 8]))
    assert cache.match(make([5, 6, 7, 8, 9])) == []


def test_salt_and_adapter_are_told_apart():
    cache, pool = fresh()
    computed(cache, pool, make([1] * 8, cache_salt="x"))
    assert cache.match(make([1] * 8)) == []
    assert cache.match(make([1] * 8, adapter="x")) == []
    assert len(cache.match(make([1] * 8, cache_salt="x"))) == 1
    assert root_hash("a", "b,c") != root_hash("a,b", "c")


def test_of_two_blocks_with_one_content_the_first_is_found():
    cache, pool = fresh()
    first = computed(cache, pool, make([1] * 8))
    second = computed(cache, pool, make([1] * 8))
    assert cache.match(make([1] * 9)) == first.block_ids
    pool.free(second.block_ids)
    assert cache.match(make([1] * 9)) == first.block_ids
    cache.check_integrity()


def test_a_freed_block_is_found_until_it_is_given_away():
    cache, pool = fresh(num_blocks=3)
    first = computed(cache, pool, make([1] * 8))
    pool.free(first.block_ids)
    assert cache.match(make([1] * 9)) == first.block_ids
    pool.allocate(1)
    assert cache.match(make([1] * 9)) == first.block_ids[:1]
    pool.allocate(1)
    assert cache.match(make([1] * 9)) == []
    assert len(cache) == 0


def test_forgotten_blocks_are_not_found_and_stay_with_their_owner():
    cache, pool = fresh()
    first = computed(cache, pool, make([1] * 8))
    cache.forget(first.block_hashes[1:])
    assert cache.match(make([1] * 9)) == first.block_ids[:1]
    cache.reset()
    assert cache.match(make([1] * 9)) == []
    pool.check_integrity([first.block_ids])
    cache.check_integrity()


@given(token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=30), cuts=st.lists(st.integers(0, 7), max_size=4))
def test_hashes_do_not_depend_on_how_often_they_were_extended(token_ids, cuts):
    whole, in_parts = make(token_ids), make(token_ids)
    num_blocks = len(token_ids) // BLOCK_SIZE
    extend_block_hashes(whole, num_blocks, BLOCK_SIZE)
    for cut in (*cuts, num_blocks):
        extend_block_hashes(in_parts, min(cut, num_blocks), BLOCK_SIZE)
    assert whole.block_hashes == in_parts.block_hashes
    assert len(whole.block_hashes) == num_blocks


NUM_BLOCKS = 9  # of the pool below: two requests fill it
Prefix = tuple[str | None, tuple[int, ...]]  # salt, and all tokens up to a block's end


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests that begin, compute block by block, and end, over a pool that is nearly always full.

    Beside it a plain model: which prefixes can be found and where, and which free blocks go first.
    """

    num_hits: ClassVar[int] = 0
    num_evictions: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.pool = fresh(num_blocks=NUM_BLOCKS)
        self.running: list[Request] = []
        self.findable: dict[Prefix, int] = {}
        self.blank = set(range(1, NUM_BLOCKS))
        self.kept: list[int] = []  # free and findable, the first to be evicted first

    @rule(
        blocks=st.lists(st.integers(0, 1), min_size=1, max_size=4),
        num_more=st.integers(0, BLOCK_SIZE - 1),
        cache_salt=st.sampled_from([None, None, None, "x"]),
        num_computed=st.integers(0, 4),
    )
    def begin(self, blocks: list[int], num_more: int, cache_salt: str | None, num_computed: int) -> None:
        """A request takes its blocks, those of requests that end for it where there are too few."""
        token_ids = [token_id for token_id in blocks for _ in range(BLOCK_SIZE)] + [0] * num_more
        request = make(token_ids, cache_salt=cache_salt)
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        while num_blocks - len(found := self.expected(request)) > self.num_free_beside(found):
            self.end_one(self.running[0])
        assert self.cache.match(request) == found
        self.pool.touch(found)
        self.kept = [block_id for block_id in self.kept if block_id not in found]
        request.block_ids = found + self.allocate(num_blocks - len(found))
        request.num_computed_tokens = len(found) * BLOCK_SIZE
        self.running.append(request)
        type(self).num_hits += len(found)
        self.compute_blocks(request, num_computed)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_blocks=st.integers(1, 4))
    def compute(self, data: st.DataObject, num_blocks: int) -> None:
        self.compute_blocks(data.draw(st.sampled_from(self.running)), num_blocks)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.end_one(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.findable)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running or [make([0] * BLOCK_SIZE)]))
        extend_block_hashes(request, len(request.token_ids) // BLOCK_SIZE, BLOCK_SIZE)
        self.cache.forget(request.block_hashes)
        for index in range(len(request.block_hashes)):
            block_id = self.findable.pop(prefix(request, index), None)
            if block_id in self.kept:
                self.kept.remove(block_id)
                self.blank.add(block_id)

    def compute_blocks(self, request: Request, num_blocks: int) -> None:
        first = request.num_computed_tokens // BLOCK_SIZE
        last = min(first + num_blocks, len(request.token_ids) // BLOCK_SIZE)
        self.cache.insert(request, first, last)
        for index in range(first, last):
            self.findable.setdefault(prefix(request, index), request.block_ids[index])
        request.num_computed_tokens = last * BLOCK_SIZE

    def end_one(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.free(request.block_ids)
        owned = {block_id for other in self.running for block_id in other.block_ids}
        for block_id in reversed(request.block_ids):
            if block_id not in owned:
                self.free(block_id)

    def num_free_beside(self, found: list[int]) -> int:
        return len(self.blank) + len([block_id for block_id in self.kept if block_id not in found])

    def expected(self, request: Request) -> list[int]:
        """The blocks of its prefixes, shortest first, up to one that cannot be found; never its last token's."""
        keys = (prefix(request, index) for index in range((len(request.token_ids) - 1) // BLOCK_SIZE))
        return [self.findable[key] for key in itertools.takewhile(self.findable.__contains__, keys)]

    def allocate(self, num_blocks: int) -> list[int]:
        """Blank blocks in any order, then the kept ones in theirs, whose content cannot be found any more."""
        block_ids = self.pool.allocate(num_blocks)
        for block_id in block_ids:
            if self.blank:
                self.blank.remove(block_id)
                continue
            assert block_id == self.kept.pop(0)
            (evicted,) = (key for key, holder in self.findable.items() if holder == block_id)
            del self.findable[evicted]
            type(self).num_evictions += 1
        return block_ids

    def free(self, block_id: int) -> None:
        if block_id in self.findable.values():
            self.kept.append(block_id)
        else:
            self.blank.add(block_id)

    @invariant()
    def the_books_balance(self) -> None:
        self.cache.check_integrity()
        self.pool.check_integrity([request.block_ids for request in self.running])
        assert self.pool.num_free == len(self.blank) + len(self.kept)
        assert len(self.cache) == len(self.findable)


def prefix(request: Request, index: int) -> Prefix:
    return request.cache_salt, tuple(request.token_ids[: (index + 1) * BLOCK_SIZE])


def test_exactly_what_was_inserted_and_not_evicted_is_found():
    PrefixCacheMachine.num_hits = PrefixCacheMachine.num_evictions = 0
    run_state_machine_as_test(
        PrefixCacheMachine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None)
    )
    assert PrefixCacheMachine.num_hits > 50
    assert PrefixCacheMachine.num_evictions > 50
