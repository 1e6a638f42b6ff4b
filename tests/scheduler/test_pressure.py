"""Far more work than the pool can hold: everybody is preempted, nobody's answer changes, everybody ends."""

from __future__ import annotations

import random

import pytest

from jaxserve.outputs import FinishReason
from tests.scheduler.harness import Harness


def crowd(random_source: random.Random, harness: Harness, number: int) -> None:
    """Add one request of a crowd that shares prefixes and wants more than there is."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 8][: random_source.randrange(9)]
    prompt += [random_source.randrange(1, 3) for _ in range(random_source.randrange(4))]
    harness.add(
        f"request-{number}",
        prompt or [9],
        max_tokens=random_source.choice([3, 10, 25, 40]),
        priority=random_source.randrange(3),
        prompt_logprobs=random_source.choice([None, None, None, 0]),
        logprobs=random_source.choice([None, 0]),
    )


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_crowd_on_a_small_pool_is_answered_as_if_each_were_alone(policy, depth, prefix_cache):
    num_preemptions = 0
    for seed in range(12):
        random_source = random.Random(seed)
        block_size = random_source.choice([1, 2, 4])
        harness = Harness(
            num_blocks=2 + random_source.randrange(12, 40) // block_size,
            block_size=block_size,
            prefix_cache=prefix_cache,
            depth=depth,
            policy=policy,
            max_num_batched_tokens=random_source.choice([8, 12, 64]),
            long_prefill_token_threshold=random_source.choice([0, 3]),
        )
        for number in range(12):
            crowd(random_source, harness, number)
            for _ in range(random_source.randrange(4)):
                harness.step()
            harness.scheduler.check_integrity()
        harness.run()
        for request_id in harness.deltas:
            harness.check_answer(request_id)
        num_preemptions += harness.scheduler.stats().num_preemptions
    assert num_preemptions > 30, "the pool was not small enough to test anything"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_aborts_and_failures_under_pressure_leave_the_others_alone(depth):
    for seed in range(20):
        random_source = random.Random(seed)
        harness = Harness(num_blocks=14, block_size=2, depth=depth)
        for number in range(14):
            crowd(random_source, harness, number)
            harness.step()
            victim = f"request-{random_source.randrange(number + 1)}"
            if random_source.random() < 0.2:
                harness.abort(victim)
            elif random_source.random() < 0.2:
                harness.device.failing.add(victim)
            harness.scheduler.check_integrity()
        harness.run()
        for request_id in harness.deltas:
            harness.check_answer(request_id)


def test_a_request_as_large_as_the_pool_gets_all_of_it():
    harness = Harness(num_blocks=5, block_size=4)  # 16 positions, and a last token that needs none
    harness.add("small", [1, 2, 3], max_tokens=10, ignore_eos=True)
    harness.add("large", [4] * 16, max_tokens=100, ignore_eos=True)
    harness.run()
    assert len(harness.output("small")) == 10
    assert len(harness.output("large")) == 1
    assert harness.finish_reason("large") is FinishReason.LENGTH


def test_a_sequence_that_outgrows_the_pool_ends_with_length():
    harness = Harness(num_blocks=5, block_size=4, max_model_len=100)
    harness.add("endless", [1, 2, 3], ignore_eos=True)
    harness.run()
    assert len(harness.output("endless")) == 14
    assert harness.finish_reason("endless") is FinishReason.LENGTH
