"""The block pool: every block is free or owned, and useful content is given up last and oldest first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from jaxserve.cache.block_pool import BlockPool, IntegrityError


def test_block_0_is_never_handed_out():
    pool = BlockPool(5, 16)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.usage) == (0, 1.0)


def test_more_than_is_free_is_refused():
    pool = BlockPool(3, 16)
    with pytest.raises(IntegrityError, match="3 blocks wanted, 2 of 2 are free"):
        pool.allocate(3)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (4, 0)])
def test_a_pool_without_room_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="num_blocks >= 2 and block_size >= 1"):
        BlockPool(num_blocks, block_size)


def test_a_block_is_free_when_its_last_owner_leaves():
    pool = BlockPool(3, 16)
    (block_id,) = pool.allocate(1)
    pool.touch([block_id])
    pool.free([block_id])
    assert (pool.references(block_id), pool.num_free) == (1, 1)
    pool.free([block_id])
    assert (pool.references(block_id), pool.num_free) == (0, 2)


def test_a_block_freed_twice_is_noticed():
    pool = BlockPool(3, 16)
    block_ids = pool.allocate(1)
    pool.free(block_ids)
    with pytest.raises(IntegrityError, match="nobody owns it"):
        pool.free(block_ids)


def test_a_free_block_without_content_cannot_be_shared():
    pool = BlockPool(3, 16)
    with pytest.raises(IntegrityError, match="cannot be shared"):
        pool.touch([1])


def test_a_kept_block_can_be_shared_again_after_it_was_freed():
    pool = BlockPool(4, 16)
    block_ids = pool.allocate(2)
    pool.keep(block_ids[0])
    pool.free(block_ids)
    assert pool.num_free_among(block_ids) == 2
    pool.touch(block_ids[:1])
    assert (pool.references(block_ids[0]), pool.num_free) == (1, 2)
    assert pool.num_free_among(block_ids) == 1
    pool.check_integrity([block_ids[:1]])


def test_kept_blocks_are_evicted_after_blank_ones_tails_first_and_oldest_first():
    pool = BlockPool(7, 16)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    older, newer = pool.allocate(2), pool.allocate(2)
    for block_id in older + newer:
        pool.keep(block_id)
    pool.free(older)
    pool.free(newer)
    pool.allocate(2)
    assert evicted == []
    pool.allocate(4)
    assert evicted == [older[1], older[0], newer[1], newer[0]]


def test_a_discarded_block_is_blank_again():
    pool = BlockPool(3, 16)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    (block_id,) = pool.allocate(1)
    pool.keep(block_id)
    pool.free([block_id])
    pool.discard(block_id)
    pool.allocate(2)
    assert evicted == []


def test_tables_that_disagree_with_the_reference_counts_are_reported():
    pool = BlockPool(4, 16)
    block_ids = pool.allocate(2)
    pool.check_integrity([block_ids])
    with pytest.raises(IntegrityError, match=r"differ from the owners: 1: 1 != 0"):
        pool.check_integrity([block_ids[1:]])


class BlockPoolModel(RuleBasedStateMachine):
    """Tables of several owners over one pool; content of kept blocks is modelled by a set."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, 4)
        self.pool.on_evict = self.on_evict
        self.owned: dict[int, list[int]] = {}
        self.kept: set[int] = set()
        self.num_tables = 0

    def on_evict(self, block_id):
        assert not any(block_id in table for table in self.owned.values()), "an owned block lost its content"
        self.kept.remove(block_id)

    def own(self, block_ids):
        self.num_tables += 1
        self.owned[self.num_tables] = block_ids
        return self.num_tables

    @rule(target=tables, num_blocks=st.integers(0, 6))
    def allocate(self, num_blocks):
        if num_blocks > self.pool.num_free:
            return multiple()
        block_ids = self.pool.allocate(num_blocks)
        assert len(set(block_ids)) == num_blocks
        assert not self.kept & set(block_ids)
        return self.own(block_ids)

    @rule(target=tables, data=st.data())
    def share(self, data):
        shareable = sorted(self.kept.union(*self.owned.values()))
        block_ids = data.draw(st.lists(st.sampled_from(shareable), unique=True)) if shareable else []
        num_free = self.pool.num_free - self.pool.num_free_among(block_ids)
        self.pool.touch(block_ids)
        assert self.pool.num_free == num_free
        return self.own(block_ids)

    @rule(table=tables)
    def keep(self, table):
        for block_id in self.owned.get(table, [])[::2]:
            self.pool.keep(block_id)
            self.kept.add(block_id)

    @rule(data=st.data())
    def discard(self, data):
        if self.kept:
            block_id = data.draw(st.sampled_from(sorted(self.kept)))
            self.pool.discard(block_id)
            self.kept.remove(block_id)

    @rule(table=consumes(tables))
    def free(self, table):
        self.pool.free(self.owned.pop(table))

    @invariant()
    def books_balance(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.owned.values())
            owned = set().union(*self.owned.values())
            assert self.pool.num_free + len(owned) == self.pool.num_usable


TestBlockPoolModel = BlockPoolModel.TestCase
TestBlockPoolModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
