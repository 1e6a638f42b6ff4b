"""The index against a plain scan, and what it proposes."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.speculative.ngram import NgramProposer, Runs
from jaxserve.speculative.proposer import Proposal


def scanned(token_ids: list[int], *, min_tokens: int, max_tokens: int, num_tokens: int) -> Proposal | None:
    """The longest run that ends the sequence and stands in it before, where it stands last; by looking everywhere."""
    for size in range(max_tokens, min_tokens - 1, -1):
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == token_ids[-size:]:
                following = list(token_ids)
                for offset in range(num_tokens):
                    following.append(following[end + offset])
                return Proposal(following[len(token_ids) :], size)
    return None


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 3))
def test_the_index_finds_what_a_scan_finds_however_the_sequence_grows(parts, min_tokens, more):
    proposer = NgramProposer(min_tokens=min_tokens, max_tokens=min_tokens + more)
    token_ids: list[int] = []
    for part in parts:
        token_ids += part
        wanted = scanned(token_ids, min_tokens=min_tokens, max_tokens=min_tokens + more, num_tokens=5)
        assert proposer.propose("r", token_ids, 5) == wanted


def test_the_last_place_counts_and_the_longest_run():
    proposer = NgramProposer(min_tokens=1, max_tokens=3)
    assert proposer.propose("a", [1, 2, 7, 1, 2, 8, 1, 2], 2) == Proposal([8, 1], 2)
    assert proposer.propose("b", [5, 1, 2, 7, 9, 1, 2, 8, 5, 1, 2], 1) == Proposal([7], 3)


def test_a_loop_is_guessed_beyond_its_end():
    assert NgramProposer(min_tokens=2, max_tokens=4).propose("a", [4, 5, 6, 4, 5], 7) == Proposal(
        [6, 4, 5, 6, 4, 5, 6], 2
    )


def test_nothing_repeats_nothing_is_proposed():
    proposer = NgramProposer(min_tokens=2, max_tokens=3)
    assert proposer.propose("a", [1], 3) is None
    assert proposer.propose("b", [1, 2, 3, 1], 3) is None


def test_requests_do_not_see_each_other_and_an_id_starts_anew_after_its_end():
    proposer = NgramProposer(min_tokens=2, max_tokens=3)
    proposer.propose("a", [1, 2, 3, 4], 3)
    assert proposer.propose("b", [1, 2], 3) is None
    proposer.release("a")
    proposer.release("never seen")
    assert proposer.propose("a", [9, 9, 1, 2], 3) is None


def grown(proposer: NgramProposer, token_ids: list[int], steps: list[int]) -> None:
    """Check the proposal at each of these lengths."""
    for length in steps:
        wanted = scanned(token_ids[:length], min_tokens=2, max_tokens=4, num_tokens=3)
        assert proposer.propose("a", token_ids[:length], 3) == wanted


@pytest.mark.parametrize("vocab_size", [3, 40, 2**31])
def test_long_sequences_move_from_the_dict_into_arrays_and_are_found_in_both(vocab_size):
    numbers = random.Random(vocab_size)
    token_ids = [numbers.randrange(vocab_size) for _ in range(700)]
    token_ids += [*token_ids[20:60], *token_ids[:200]]
    proposer = NgramProposer(min_tokens=2, max_tokens=4)
    grown(proposer, token_ids, [500, *range(501, len(token_ids))])
    assert proposer._indices["a"]._num_in_tables > 600


def test_runs_of_one_hash_are_told_apart():
    proposer = NgramProposer(min_tokens=2, max_tokens=4)
    proposer._runs = Runs(2, (1, 10, 100, 1000))  # the upper halves of all hashes are 0
    token_ids = [3, 4, 5, 6] * 8 + [number % 8 for number in range(200)] + [3, 4, 5, 6] * 8
    grown(proposer, token_ids, [150, *range(151, len(token_ids), 7)])


def test_an_index_of_a_long_prompt_is_small():
    numbers = random.Random(0)
    prompt = [numbers.randrange(30000) for _ in range(8000)]
    proposer = NgramProposer(min_tokens=2, max_tokens=5)
    tracemalloc.start()
    proposer.propose("a", prompt, 5)
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert num_bytes < 50 * len(prompt)
