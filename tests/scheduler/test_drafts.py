"""Drafts in a plan: what room they take, what becomes of those that do not hold, and who never notices."""

from __future__ import annotations

import pytest

from jaxserve.outputs import FinishReason
from jaxserve.scheduler.plan import RowError
from tests.scheduler.harness import Harness
from tests.scheduler.paged_device import expected_output


def drafting(*, most: int = 3, wrong: float = 0.0, **settings) -> Harness:
    return Harness(drafts={"most": most, "wrong": wrong}, **({"max_num_drafts": 32} | settings))


def num_steps(harness: Harness, prompt: list[int], num_tokens: int) -> int:
    harness.add("a", prompt, max_tokens=num_tokens, ignore_eos=True)
    harness.run()
    harness.check_answer("a")
    return len(harness.plans)


def test_right_drafts_save_steps_and_wrong_ones_cost_none():
    assert num_steps(Harness(), [1, 2, 3], 40) == 40
    assert num_steps(drafting(wrong=0.0), [1, 2, 3], 40) < 25
    assert num_steps(drafting(wrong=1.0), [1, 2, 3], 40) == 40


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_nothing_is_planned_while_a_length_is_unknown(depth):
    harness = drafting(wrong=0.5, depth=depth)  # the harness checks it
    for request_id in "abc":
        harness.add(request_id, [1, 2, 3, ord(request_id)], max_tokens=20, ignore_eos=True)
    harness.run()
    assert any(plan.drafts for plan in harness.plans)
    for request_id in "abc":
        harness.check_answer(request_id)


def test_several_tokens_come_in_one_delta_with_a_logprob_each():
    harness = drafting()
    harness.add("a", [1, 2], max_tokens=20, logprobs=0, ignore_eos=True)
    harness.run()
    assert max(len(delta.token_ids) for delta in harness.deltas["a"]) == 4
    for delta in harness.deltas["a"]:
        assert [entry.token_id for entry in delta.logprobs] == delta.token_ids
    positions = [-entry.logprob for delta in harness.deltas["a"] for entry in delta.logprobs]
    assert positions == list(range(2, 22))


def test_a_stop_token_among_accepted_drafts_ends_the_sequence_there():
    probe = Harness()
    probe.add("a", [5, 6, 7], max_tokens=12, ignore_eos=True)
    probe.run()
    answer = probe.output("a")
    for end in range(1, 12):
        if answer[end] in answer[:end]:
            continue
        harness = drafting(most=6)
        harness.add("a", [5, 6, 7], max_tokens=12, ignore_eos=True, stop_token_ids=[answer[end]], logprobs=0)
        harness.run()
        assert harness.output("a") == answer[: end + 1]
        assert harness.finish_reason("a") is FinishReason.STOP
        assert len(harness.deltas["a"][-1].logprobs) == len(harness.deltas["a"][-1].token_ids)


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_no_draft_goes_beyond_max_tokens(max_tokens):
    harness = drafting(most=6)  # the harness checks each plan
    harness.add("a", [5, 6, 7], max_tokens=max_tokens, ignore_eos=True)
    harness.run()
    assert len(harness.output("a")) == max_tokens
    assert harness.finish_reason("a") is FinishReason.LENGTH


def test_drafts_take_only_what_the_budget_leaves():
    harness = drafting(most=6, max_num_batched_tokens=4, max_num_seqs=4)
    for request_id in "abcd":
        harness.add(request_id, [ord(request_id)], max_tokens=9 if request_id == "a" else 3, ignore_eos=True)
    harness.run()
    full = [plan for plan in harness.plans if plan.num_rows == 4]
    assert full and not any(plan.drafts for plan in full)
    assert any(plan.drafts for plan in harness.plans)


def test_drafts_never_preempt_anybody():
    harness = drafting(num_blocks=8, block_size=2, max_num_seqs=2)
    for request_id in "ab":
        harness.add(request_id, [1, 2, ord(request_id)], max_tokens=4, ignore_eos=True, cache_salt=request_id)
    harness.run()
    assert harness.scheduler.stats().num_preemptions == 0
    assert any(plan.drafts for plan in harness.plans)


def test_blocks_of_accepted_drafts_are_shared_and_those_of_rejected_ones_are_not():
    harness = drafting(most=6, wrong=0.4, block_size=2, num_blocks=200)
    harness.add("a", [1, 2, 3], max_tokens=40, ignore_eos=True)
    harness.run()
    harness.add("b", [1, 2, 3, *harness.output("a")], max_tokens=5, ignore_eos=True)
    plan = harness.step()
    assert plan.starts[0] == 42  # all whole blocks of a's 42 computed tokens; the device checks what is in them
    harness.run()
    harness.check_answer("b")


def test_a_row_that_fails_behind_accepted_drafts_yields_those_first():
    harness = drafting()
    harness.add("a", [1, 2, 3], max_tokens=20, ignore_eos=True)
    while not (plan := harness.scheduler.schedule()) or not plan.drafts:
        if plan is not None:
            harness.in_flight.append((plan, harness.device.run(plan)))
        else:
            harness.deliver()
    while harness.in_flight:
        harness.deliver()
    result = harness.device.run(plan)
    result.token_ids[0] = result.token_ids[0][:1]
    result.errors[0] = RowError("not finite", taints_blocks=True)
    tokens, error = harness.scheduler.update(plan, result)
    assert (len(tokens.token_ids), tokens.finish_reason) == (1, None)
    assert error.finish_reason is FinishReason.ERROR
    harness.scheduler.check_integrity()


def test_an_abort_while_drafts_are_in_flight_frees_everything():
    harness = drafting()
    harness.add("a", [1, 2, 3], max_tokens=40, ignore_eos=True)
    while not harness.plans or not harness.plans[-1].drafts:
        harness.step()
    harness.abort("a")
    assert harness.drafter.released == ["a"]
    harness.run()


def test_counts_are_of_rows_drafts_and_positions():
    harness = drafting(most=2, wrong=0.0)
    harness.add("a", [1, 2, 3], max_tokens=30, ignore_eos=True)
    harness.run()
    counts = harness.scheduler.stats().drafts
    rows = [draft_ids for plan in harness.plans for draft_ids in plan.drafts.values()]
    assert counts.num_drafts == len(rows)
    assert counts.num_draft_tokens == counts.num_accepted_tokens == sum(map(len, rows))
    assert counts.accepted_per_position == (len(rows), sum(len(draft_ids) == 2 for draft_ids in rows))
    assert len(expected_output(harness.device.requests["a"], harness.token_limit)[0]) == 30
