"""The prefix cache finds what was inserted for the same tokens, adapter and salt, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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


@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=20), st.sampled_from([None, "x"])), min_size=1, max_size=8
    )
)
def test_whatever_is_found_holds_the_very_prefix(prompts):
    cache, pool = fresh(num_blocks=200)
    content: dict[int, tuple[str | None, tuple[int, ...]]] = {}  # block -> salt and all tokens up to its end
    for token_ids, cache_salt in prompts:
        request = make(token_ids, cache_salt=cache_salt)
        known = {prefix for prefix in content.values() if prefix[0] == cache_salt}
        found = cache.match(request)
        for index, block_id in enumerate(found):
            assert content[block_id] == (cache_salt, tuple(token_ids[: (index + 1) * BLOCK_SIZE]))
        next_prefix = (cache_salt, tuple(token_ids[: (len(found) + 1) * BLOCK_SIZE]))
        assert (len(found) + 1) * BLOCK_SIZE >= len(token_ids) or next_prefix not in known, "a longer prefix was known"
        computed(cache, pool, request)
        for index in range(len(token_ids) // BLOCK_SIZE):
            content[request.block_ids[index]] = (cache_salt, tuple(token_ids[: (index + 1) * BLOCK_SIZE]))
