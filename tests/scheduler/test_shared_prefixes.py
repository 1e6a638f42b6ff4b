"""Requests with a common prefix compute it once, whether they come together or one after the other."""

from __future__ import annotations

import pytest

from tests.scheduler.harness import Harness

PREFIX = list(range(1, 513))


def test_requests_that_arrive_together_compute_their_prefix_once():
    harness = Harness(num_blocks=400, block_size=16, max_num_seqs=32, max_num_batched_tokens=2048, max_model_len=1024)
    for number in range(32):
        harness.add(f"request-{number}", [*PREFIX, 600 + number], max_tokens=4, ignore_eos=True)
    plan = harness.step()
    assert plan.num_tokens == [513] + [1] * 31
    assert harness.scheduler.stats().prefix_hit_tokens == 31 * 512
    harness.run()
    for request_id in harness.deltas:
        harness.check_answer(request_id)


def test_a_prefix_longer_than_the_budget_is_still_computed_once():
    harness = Harness(num_blocks=400, block_size=16, max_num_batched_tokens=128, max_model_len=1024)
    for number in range(8):
        harness.add(f"request-{number}", [*PREFIX, 600 + number], max_tokens=2, ignore_eos=True)
    harness.run()
    assert harness.device.num_tokens_run <= 513 + 7 * (1 + 16) + 8


def test_a_prompt_that_is_cached_whole_computes_its_last_block_again():
    harness = Harness(block_size=4)
    for request_id in "ab":
        harness.add(request_id, [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
        harness.run()
    assert [plan.starts for plan in harness.plans] == [[0], [4]]


def test_an_answer_is_found_by_the_next_turn():
    harness = Harness(block_size=4)
    harness.add("turn-1", [1, 2, 3, 4, 5, 6], max_tokens=7, ignore_eos=True)
    harness.run()
    # The last token's K and V were never computed: 12 of the 13 tokens are cached.
    harness.add("turn-2", [1, 2, 3, 4, 5, 6, *harness.output("turn-1"), 9], max_tokens=2)
    harness.run()
    assert harness.deltas["turn-2"][0].num_cached_tokens == 12
    harness.check_answer("turn-2")


@pytest.mark.parametrize("field", ["cache_salt", "adapter"])
def test_salt_and_adapter_keep_prefixes_apart(field):
    harness = Harness()
    harness.add("a", [1] * 20, max_tokens=1)
    harness.run()
    harness.add("b", [1] * 20, max_tokens=1, **{field: "other"})
    harness.run()
    assert harness.deltas["b"][0].num_cached_tokens == 0
    harness.check_answer("b")


def test_the_owner_of_a_shared_prefix_may_leave_before_its_step_was_run():
    harness = Harness(block_size=4)
    harness.add("owner", [1] * 20, ignore_eos=True)
    harness.add("guest", [*[1] * 16, 2, 3], max_tokens=5, ignore_eos=True)
    plan = harness.scheduler.schedule()
    harness.abort("owner")
    harness.scheduler.check_integrity()
    harness.in_flight.append((plan, harness.device.run(plan)))
    harness.run()
    assert harness.deltas["guest"][0].num_cached_tokens == 16
    harness.check_answer("guest")


def test_a_preempted_request_finds_its_own_blocks_again():
    harness = Harness(num_blocks=9, block_size=2, max_num_seqs=2)
    for request_id in "ab":
        harness.add(request_id, [1, 2, 3], max_tokens=9, ignore_eos=True, cache_salt=request_id)
    harness.run()
    resumed = [plan for plan in harness.plans if plan.new_slots][-1]
    assert resumed.starts[-1] > 0
    stats = harness.scheduler.stats()
    assert (stats.num_preemptions, stats.prefix_hit_tokens) == (1, 0), "its own blocks are no hit"


def test_without_a_prefix_cache_nothing_is_shared():
    harness = Harness(prefix_cache=False)
    for request_id in "ab":
        harness.add(request_id, [1] * 20, max_tokens=1)
    assert harness.step().num_tokens == [20, 20]
    assert harness.scheduler.reset_prefix_cache() is False


def test_a_reset_forgets_prefixes_and_leaves_running_requests_alone():
    harness = Harness()
    harness.add("a", [1] * 12, max_tokens=8, ignore_eos=True)
    harness.step()
    assert harness.scheduler.reset_prefix_cache() is True
    harness.add("b", [1] * 12, max_tokens=8, ignore_eos=True)
    assert dict(zip((plan := harness.step()).request_ids, plan.starts, strict=True)) == {"a": 12, "b": 0}
    harness.run()
    harness.check_answer("a")
    harness.check_answer("b")
