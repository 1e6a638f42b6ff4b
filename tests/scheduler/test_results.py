"""What `update` and `abort` make of results: ends, first deltas, log-probabilities, errors."""

from __future__ import annotations

import pytest

from jaxserve.outputs import FinishReason
from jaxserve.scheduler.plan import RowError, StepResult
from tests.scheduler.harness import Harness
from tests.scheduler.paged_device import expected_output


def tokens_alone(harness: Harness, request_id: str) -> list[int]:
    return expected_output(harness.device.requests[request_id], harness.token_limit)[0]


def with_known_answer(**fields) -> tuple[Harness, list[int]]:
    """A harness with a request that has run to its length, and what it yielded."""
    harness = Harness()
    harness.add("known", [5, 6, 7], max_tokens=6, ignore_eos=True)
    harness.run()
    answer = harness.output("known")
    assert len(set(answer)) == 6, "the test needs an answer without repeats"
    harness.add("a", [5, 6, 7], max_tokens=6, **{name: value(answer) for name, value in fields.items()})
    harness.run()
    return harness, answer


def test_eos_ends_a_sequence_and_is_no_stop_token():
    harness, answer = with_known_answer(eos=lambda answer: [answer[2]])
    assert harness.output("a") == answer[:3]
    last = harness.deltas["a"][-1]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, None)


def test_ignore_eos_goes_on():
    harness, answer = with_known_answer(eos=lambda answer: [answer[2]], ignore_eos=lambda answer: True)
    assert harness.output("a") == answer
    assert harness.finish_reason("a") is FinishReason.LENGTH


def test_a_stop_token_ends_a_sequence_and_is_named():
    harness, answer = with_known_answer(stop_token_ids=lambda answer: [answer[1]])
    assert harness.output("a") == answer[:2]
    last = harness.deltas["a"][-1]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, answer[1])


def test_a_stop_token_that_is_eos_is_named_under_ignore_eos():
    harness, answer = with_known_answer(
        eos=lambda answer: [answer[1]], stop_token_ids=lambda answer: [answer[1]], ignore_eos=lambda answer: True
    )
    assert harness.deltas["a"][-1].stop_token_id == answer[1]


def test_no_stop_token_counts_before_min_tokens():
    harness, answer = with_known_answer(
        stop_token_ids=lambda answer: [answer[1], answer[4]], min_tokens=lambda answer: 3
    )
    assert harness.output("a") == answer[:5]


def test_the_plan_names_the_tokens_that_min_tokens_masks():
    harness = Harness()
    harness.add("a", [1], eos=[7, 8], stop_token_ids=[9], max_tokens=1)
    harness.add("b", [1], eos=[7, 8], stop_token_ids=[9], ignore_eos=True, max_tokens=1)
    first, second = harness.step().new_slots
    assert sorted(first.stop_token_ids) == [7, 8, 9]
    assert second.stop_token_ids == [9]


def test_the_row_in_flight_of_a_request_that_ended_is_dropped():
    harness, answer = with_known_answer(stop_token_ids=lambda answer: [answer[2]])
    assert sum("a" in plan.request_ids for plan in harness.plans) == 4
    assert harness.output("a") == answer[:3]


def test_the_first_delta_tells_waiting_time_and_cached_tokens_and_no_other_does():
    harness = Harness(block_size=4)
    harness.add("a", [1] * 9, max_tokens=2, ignore_eos=True)
    harness.run()
    harness.add("b", [1] * 9, max_tokens=2, ignore_eos=True)
    harness.run()
    (a_first, a_second), (b_first, _) = harness.deltas["a"], harness.deltas["b"]
    assert (a_first.num_cached_tokens, b_first.num_cached_tokens, a_second.num_cached_tokens) == (0, 8, None)
    assert a_first.queued_s >= 0.0
    assert a_second.queued_s is None


def test_logprobs_come_with_their_token():
    harness = Harness()
    harness.add("a", [1, 2], max_tokens=3, logprobs=0, ignore_eos=True)
    harness.add("b", [1, 2], max_tokens=3, ignore_eos=True)
    harness.run()
    assert [delta.logprobs[0].token_id for delta in harness.deltas["a"]] == harness.output("a")
    assert all(delta.logprobs is None for delta in harness.deltas["b"])


def test_prompt_logprobs_come_once_and_whole_though_the_prompt_came_in_chunks():
    harness = Harness(max_num_batched_tokens=8, max_num_seqs=2)
    prompt = list(range(1, 21))
    harness.add("a", prompt, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    harness.run()
    first, second = harness.deltas["a"]
    assert first.prompt_logprobs[0] is None
    assert [entry.token_id for entry in first.prompt_logprobs[1:]] == prompt[1:]
    assert [entry.logprob for entry in first.prompt_logprobs[1:]] == [-float(p) for p in range(1, 20)]
    assert second.prompt_logprobs is None


def test_prompt_logprobs_of_a_prompt_of_one_token_are_one_none():
    harness = Harness()
    harness.add("a", [1], max_tokens=1, prompt_logprobs=0)
    harness.run()
    assert harness.deltas["a"][0].prompt_logprobs == [None]


def test_prompt_logprobs_skip_the_prefix_cache():
    harness = Harness()
    harness.add("a", [1] * 12, max_tokens=1)
    harness.run()
    harness.add("b", [1] * 12, max_tokens=1, prompt_logprobs=0)
    assert harness.step().starts == [0]
    harness.run()
    harness.check_answer("b")


def test_an_error_ends_its_row_alone():
    harness = Harness()
    for request_id in "ab":
        harness.add(request_id, [1, 2, 3], max_tokens=4, ignore_eos=True)
    harness.step()
    harness.device.failing.add("a")
    harness.run()
    last = harness.deltas["a"][-1]
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "non-finite logits")
    assert harness.output("b") == tokens_alone(harness, "b")


def test_what_a_failed_request_computed_is_not_shared():
    harness = Harness(block_size=4)
    harness.device.failing.add("a")
    harness.add("a", [1] * 12, max_tokens=4)
    harness.run()
    harness.add("b", [1] * 12, max_tokens=1)
    assert harness.step().starts == [0]


def test_a_request_that_failed_by_its_own_rules_leaves_its_prefix_to_others():
    harness = Harness(block_size=4)
    harness.device.ruled_out.add("a")
    harness.add("a", [1] * 12, max_tokens=4)
    harness.run()
    assert harness.finish_reason("a") is FinishReason.ERROR
    harness.add("b", [1] * 12, max_tokens=1)
    assert harness.step().starts == [8]


def test_what_a_request_computed_before_it_was_preempted_and_failed_is_not_shared():
    harness = Harness(num_blocks=6, block_size=2)
    harness.add("a", [1, 2, 3, 4], max_tokens=4, ignore_eos=True)
    harness.add("b", [5, 6, 7, 8], max_tokens=4, ignore_eos=True)
    harness.device.failing.add("b")
    harness.step()
    harness.step()  # "b" gives up its blocks here, and is found to have failed
    assert harness.scheduler.stats().num_preemptions == 1
    assert harness.finish_reason("b") is FinishReason.ERROR
    harness.run()
    harness.add("c", [5, 6, 7, 8, 9], max_tokens=1)
    assert harness.step().starts == [0]


def test_what_a_request_computed_before_it_was_aborted_and_failed_is_not_shared():
    harness = Harness(block_size=4)
    harness.device.failing.add("a")
    harness.add("a", [1] * 12, max_tokens=4)
    harness.step()
    harness.abort("a")
    harness.run()
    harness.add("b", [1] * 12, max_tokens=1)
    assert harness.step().starts == [0]


def test_an_abort_frees_at_once_and_ends_the_sequence():
    harness = Harness()
    harness.add("running", [1, 2, 3], ignore_eos=True)
    harness.step()
    harness.add("waiting", [1, 2, 3], ignore_eos=True)
    deltas = harness.abort("running", "waiting", "unknown")
    assert [(delta.request_id, delta.finish_reason) for delta in deltas] == [
        ("running", FinishReason.ABORT),
        ("waiting", FinishReason.ABORT),
    ]
    assert harness.pool.num_free == harness.pool.num_usable
    assert not harness.scheduler.has_unfinished
    assert harness.abort("running") == []
    harness.run()


def test_a_result_in_flight_does_not_reach_a_new_request_with_the_same_id():
    harness = Harness()
    harness.add("a", [1, 2, 3], ignore_eos=True)
    harness.step()
    harness.abort("a")
    harness.add("a", [5, 6], max_tokens=2, ignore_eos=True)
    harness.run()
    harness.check_answer("a")


def test_a_step_that_failed_as_a_whole_can_be_reported_row_by_row():
    harness = Harness()
    for request_id in "ab":
        harness.add(request_id, [1, 2, 3])
    plan = harness.scheduler.schedule()
    errors = dict.fromkeys(range(plan.num_rows), RowError("the device is gone", taints_blocks=True))
    deltas = harness.scheduler.update(plan, StepResult(step_id=plan.step_id, token_ids=[[], []], errors=errors))
    assert [delta.finish_reason for delta in deltas] == [FinishReason.ERROR] * 2
    harness.scheduler.check_integrity()


def test_a_plan_that_is_not_in_flight_is_refused():
    harness = Harness()
    harness.add("a", [1], max_tokens=1)
    plan = harness.step()
    harness.deliver()
    with pytest.raises(KeyError):
        harness.scheduler.update(plan, StepResult(step_id=plan.step_id, token_ids=[[0]]))
