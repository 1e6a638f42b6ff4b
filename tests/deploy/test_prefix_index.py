"""Which replica a prompt is sent to, from what was sent before and from what each one has to do."""

from __future__ import annotations

import doctest

import pytest

from jaxserve.deploy import metrics, prefix_index
from jaxserve.deploy.prefix_index import PrefixIndex, prompt_hashes, split_hashes

BLOCK = 16
IDLE = {"a": 0, "b": 0, "c": 0}


def blocks(*values: int, salt: str | None = None) -> list[bytes]:
    """Hashes of a prompt with one block a value."""
    token_ids = [value for value in values for _ in range(BLOCK)]
    return split_hashes(prompt_hashes([*token_ids, 0], BLOCK, salt))


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex()
    index.set_replicas(dict.fromkeys(IDLE, 8))
    return index


def test_the_longest_cached_prefix_comes_first(index):
    index.insert("a", blocks(1, 2))
    index.insert("b", blocks(1, 2, 3))
    assert index.match(blocks(1, 2, 3, 4), IDLE) == {"a": 2, "b": 3, "c": 0}
    assert index.order(blocks(1, 2, 3, 4), IDLE, 4) == ["b", "a", "c"]


def test_a_prompt_that_nobody_knows_goes_to_the_least_loaded(index):
    assert index.order(blocks(9), {"a": 2, "b": 1, "c": 3}, 4) == ["b", "a", "c"]


def test_of_equally_loaded_replicas_the_emptiest_cache_is_filled(index):
    index.insert("a", blocks(1))
    index.insert("b", blocks(2, 3))
    assert index.order(blocks(9), IDLE, 4) == ["c", "a", "b"]


def test_a_cached_prefix_is_given_up_where_its_holder_has_too_much_to_do(index):
    index.insert("a", blocks(1, 2))
    assert index.order(blocks(1, 2), {"a": 4, "b": 0, "c": 1}, 4)[0] == "a"
    assert index.order(blocks(1, 2), {"a": 5, "b": 0, "c": 1}, 4) == ["b", "c", "a"]


def test_a_few_common_words_at_the_start_are_no_reason(index):
    index.insert("a", blocks(1, *range(100, 106)))
    assert index.order(blocks(1, *range(10, 20)), {"a": 1, "b": 0, "c": 0}, 4)[0] != "a"


def test_the_same_tokens_under_another_salt_are_another_prefix(index):
    index.insert("a", blocks(1, 2, salt="tenant"))
    assert index.match(blocks(1, 2), ["a"]) == {"a": 0}
    assert index.match(blocks(1, 2, salt="tenant"), ["a"]) == {"a": 2}


def test_the_last_blocks_of_the_least_recent_prompt_are_thought_evicted(index):
    index.insert("a", blocks(1, 2, 3, 4))
    index.insert("a", blocks(5, 6, 7, 8))
    index.insert("a", blocks(9, 10))
    assert index.num_blocks("a") == 8
    assert index.match(blocks(1, 2, 3, 4), ["a"]) == {"a": 2}
    assert index.match(blocks(5, 6, 7, 8), ["a"]) == {"a": 4}


def test_what_a_dead_replica_held_is_forgotten(index):
    for replica in "ab":
        index.insert(replica, blocks(1, 2))
    index.forget("a")
    assert index.match(blocks(1, 2), IDLE) == {"a": 0, "b": 2, "c": 0}
    index.set_replicas({"a": 8, "c": 8})
    assert index.match(blocks(1, 2), ["a", "c"]) == {"a": 0, "c": 0}
    index.insert("b", blocks(1, 2))  # its answer was under way
    assert index.match(blocks(1, 2), ["a", "c"]) == {"a": 0, "c": 0}


@pytest.mark.parametrize("module", [prefix_index, metrics])
def test_the_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
