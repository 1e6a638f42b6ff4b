"""What `schedule` puts into a step: order, budget, chunks, slots, blocks, preemption."""

from __future__ import annotations

import pytest

from jaxserve.errors import ConfigError, InvalidRequestError, PromptTooLongError, QueueFullError
from jaxserve.outputs import FinishReason
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.settings import SchedulerSettings
from tests.scheduler.harness import Harness
from tests.scheduler.paged_device import make_request


def planned(plan: StepPlan | None) -> dict[str, tuple[int, int, bool]]:
    """Request -> (start, tokens, samples)."""
    assert plan is not None
    rows = zip(plan.starts, plan.num_tokens, plan.samples, strict=True)
    return dict(zip(plan.request_ids, rows, strict=True))


def endless(harness: Harness, request_id: str, prompt: list[int], **fields) -> None:
    harness.add(request_id, prompt, ignore_eos=True, **fields)


def test_nothing_to_do_is_no_plan():
    assert Harness().scheduler.schedule() is None


def test_a_prompt_is_computed_whole_and_yields_a_token():
    harness = Harness()
    endless(harness, "a", [1, 2, 3, 4, 5])
    plan = harness.step()
    assert planned(plan) == {"a": (0, 5, True)}
    (new_slot,) = plan.new_slots
    assert (new_slot.slot, new_slot.token_ids, new_slot.num_prompt_tokens) == (plan.slots[0], [1, 2, 3, 4, 5], 5)
    assert len(new_slot.block_ids) == 2


def test_a_decode_is_planned_before_its_input_token_is_known():
    harness = Harness()
    endless(harness, "a", [1, 2, 3])
    harness.step()
    assert planned(harness.scheduler.schedule()) == {"a": (3, 1, True)}


def test_a_block_is_appended_when_the_sequence_reaches_it():
    harness = Harness(block_size=4)
    endless(harness, "a", [1, 2, 3])
    plans = [harness.step() for _ in range(6)]
    assert [len(plan.new_blocks) for plan in plans] == [0, 0, 1, 0, 0, 0]
    slot, block_ids = plans[2].new_blocks[0]
    assert slot == plans[0].slots[0]
    assert len(block_ids) == 1


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    harness = Harness(max_num_batched_tokens=10)
    endless(harness, "short", [1, 2])
    endless(harness, "long", [3] * 20)
    assert planned(harness.step()) == {"short": (0, 2, True), "long": (0, 8, False)}
    assert planned(harness.step()) == {"short": (2, 1, True), "long": (8, 9, False)}
    assert planned(harness.step()) == {"short": (3, 1, True), "long": (17, 3, True)}


def test_the_long_prefill_threshold_leaves_budget_to_others():
    harness = Harness(max_num_batched_tokens=16, long_prefill_token_threshold=4)
    endless(harness, "long", [1] * 10)
    endless(harness, "other", [2] * 3)
    assert planned(harness.step()) == {"long": (0, 4, False), "other": (0, 3, True)}


def test_a_prefill_of_high_priority_leaves_a_token_to_every_running_request():
    harness = Harness(max_num_batched_tokens=8, policy="priority")
    endless(harness, "a", [1], priority=5)
    endless(harness, "b", [2], priority=5)
    harness.step()
    endless(harness, "urgent", [3] * 30, priority=0)
    assert planned(harness.step()) == {"a": (1, 1, True), "b": (1, 1, True), "urgent": (0, 6, False)}
    assert planned(harness.step()) == {"urgent": (6, 6, False), "a": (2, 1, True), "b": (2, 1, True)}


def test_no_more_requests_run_than_there_are_slots():
    harness = Harness(max_num_seqs=2, max_num_batched_tokens=64)
    for request_id in "abc":
        endless(harness, request_id, [1], max_tokens=3)
    assert planned(harness.step()).keys() == {"a", "b"}
    harness.run()
    assert [plan for plan in harness.plans if "c" in plan.request_ids][0].slots[0] in (1, 2)


def test_priority_decides_who_is_admitted_and_arrival_breaks_ties():
    harness = Harness(max_num_seqs=1, policy="priority")
    endless(harness, "late", [1], priority=1, arrival_time_s=2.0, max_tokens=1)
    endless(harness, "early", [1], priority=1, arrival_time_s=1.0, max_tokens=1)
    endless(harness, "urgent", [1], priority=0, arrival_time_s=3.0, max_tokens=1)
    harness.run()
    assert [plan.request_ids for plan in harness.plans] == [["urgent"], ["early"], ["late"]]


def test_fcfs_ignores_priority():
    harness = Harness(max_num_seqs=1)
    endless(harness, "first", [1], priority=9, max_tokens=1)
    endless(harness, "second", [1], priority=0, max_tokens=1)
    harness.run()
    assert [plan.request_ids for plan in harness.plans] == [["first"], ["second"]]


def run_until_preempted(harness: Harness) -> StepPlan:
    """The plan that came out of the first preemption."""
    for _ in range(100):
        plan = harness.step()
        if harness.scheduler.stats().num_preemptions:
            assert plan is not None
            return plan
    raise AssertionError("nobody was preempted")


def test_out_of_blocks_the_newest_is_preempted_and_comes_back_first():
    harness = Harness(num_blocks=9, block_size=2, max_num_seqs=3)
    for request_id in ("old", "middle", "new"):
        endless(harness, request_id, [1, 2, 3], max_tokens=8, cache_salt=request_id)
    endless(harness, "waiting", [1], max_tokens=1)
    assert set(run_until_preempted(harness).request_ids) == {"old", "middle"}
    harness.run()
    admitted = [new.request_id for plan in harness.plans for new in plan.new_slots]
    assert admitted.index("waiting") > admitted.index("new", admitted.index("new") + 1)
    assert harness.deltas["new"][-1].num_preemptions >= 1
    assert harness.deltas["old"][-1].num_preemptions == 0


def test_under_priority_the_least_important_is_preempted_though_it_is_the_oldest():
    harness = Harness(num_blocks=9, block_size=2, max_num_seqs=3, policy="priority")
    for request_id, priority in (("idle", 7), ("normal", 5), ("urgent", 0)):
        endless(harness, request_id, [1, 2, 3], max_tokens=8, priority=priority, cache_salt=request_id)
    assert set(run_until_preempted(harness).request_ids) == {"urgent", "normal"}
    harness.run()
    assert harness.deltas["urgent"][-1].num_preemptions == 0


def test_a_latecomer_of_high_priority_is_not_the_one_preempted():
    harness = Harness(num_blocks=7, block_size=2, max_num_seqs=3, policy="priority")
    endless(harness, "idle", [1, 2, 3], max_tokens=8, priority=7)
    harness.step()
    endless(harness, "urgent", [4, 5, 6], max_tokens=8, priority=0)
    assert planned(harness.step()).keys() == {"idle", "urgent"}
    assert run_until_preempted(harness).request_ids == ["urgent"]


def test_a_preempted_request_waits_for_its_token_in_flight():
    harness = Harness(num_blocks=9, block_size=2, max_num_seqs=3)
    for request_id in ("old", "middle", "new"):
        endless(harness, request_id, [1, 2, 3], max_tokens=8, cache_salt=request_id)
    run_until_preempted(harness)
    num_known = 3 + len(harness.output("new"))
    harness.run()
    resumed = [new for plan in harness.plans for new in plan.new_slots if new.request_id == "new"][1]
    assert len(resumed.token_ids) >= num_known
    harness.check_answer("new")


def test_a_newcomer_leaves_a_block_for_every_running_request_that_will_grow():
    harness = Harness(num_blocks=4, block_size=4)
    endless(harness, "growing", [1] * 4, max_tokens=6)
    endless(harness, "newcomer", [2] * 8, max_tokens=2)
    assert planned(harness.step()).keys() == {"growing"}
    harness.run()
    assert harness.scheduler.stats().num_preemptions == 0


def test_a_plan_shares_no_list_with_the_scheduler():
    harness = Harness(block_size=2)
    endless(harness, "a", [1, 2, 3], max_tokens=6)
    plan = harness.step()
    before = [list(plan.new_slots[0].block_ids), list(plan.new_slots[0].token_ids)]
    harness.run()
    assert [plan.new_slots[0].block_ids, plan.new_slots[0].token_ids] == before


def test_no_row_goes_beyond_max_tokens_though_its_end_is_not_known_yet():
    harness = Harness()
    endless(harness, "a", [1, 2, 3], max_tokens=2)
    harness.step()
    harness.step()
    assert harness.scheduler.schedule() is None
    harness.run()
    assert harness.finish_reason("a") is FinishReason.LENGTH


def test_the_context_ends_a_sequence():
    harness = Harness(max_model_len=6)
    endless(harness, "a", [1, 2, 3])
    harness.run()
    assert len(harness.output("a")) == 3
    assert harness.finish_reason("a") is FinishReason.LENGTH


def test_a_prompt_beyond_the_context_is_refused_with_numbers():
    with pytest.raises(PromptTooLongError, match=r"has 8 tokens.* takes 8"):
        Harness(max_model_len=8).add("a", [1] * 8)


def test_a_prompt_beyond_the_pool_is_refused_with_numbers():
    with pytest.raises(PromptTooLongError, match=r"needs 5 blocks of 4 tokens, the KV cache has 4"):
        Harness(num_blocks=5, block_size=4).add("a", [1] * 17)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequestError, match="at least one token"):
        Harness().add("a", [])


def test_an_id_in_use_is_refused_and_free_again_after_the_end():
    harness = Harness()
    harness.add("a", [1], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        harness.scheduler.add(make_request("a", [1]))
    harness.run()
    harness.add("a", [1], max_tokens=1)
    harness.run()


def test_a_full_queue_refuses():
    harness = Harness(max_queued_requests=2)
    for request_id in "ab":
        harness.add(request_id, [1])
    with pytest.raises(QueueFullError, match="2 requests wait"):
        harness.add("c", [1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_model_len", 0),
        ("max_queued_requests", 0),
        ("long_prefill_token_threshold", -1),
        ("policy", "lottery"),
        ("max_num_batched_tokens", 3),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(field, value):
    fields = {"max_num_seqs": 4, "max_model_len": 16, "max_queued_requests": 9} | {field: value}
    with pytest.raises(ConfigError, match=f"scheduler.{field}"):
        SchedulerSettings(**fields)


def test_stats_count_what_happened():
    harness = Harness(block_size=4, num_blocks=11)
    endless(harness, "a", [1, 2, 3, 4, 5], max_tokens=3)
    assert harness.scheduler.stats().num_waiting == 1
    harness.step()
    stats = harness.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (1, 0, pytest.approx(0.2))
    harness.run()
    stats = harness.scheduler.stats()
    assert (stats.num_running, stats.num_steps, stats.num_computed_tokens, stats.kv_cache_usage) == (0, 3, 7, 0.0)
