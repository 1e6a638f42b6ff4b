"""Any mix of requests, aborts, failures, preemptions: blocks hold what rows read, every request ends as if alone."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxserve.errors import PromptTooLongError, QueueFullError
from tests.scheduler.harness import Harness

MAX_MODEL_LEN = 40
MAX_QUEUED = 10
REQUESTS = st.fixed_dictionaries(
    {
        "shared": st.integers(0, 16),
        "own": st.lists(st.integers(1, 2), max_size=6),
        "max_tokens": st.sampled_from([None, 1, 2, 5, 12, 20]),
        "priority": st.integers(0, 2),
        "cache_salt": st.sampled_from([None, None, None, "tenant"]),
        "adapter": st.sampled_from([None, None, None, "tenant"]),
        "prompt_logprobs": st.sampled_from([None, None, 0]),
        "min_tokens": st.sampled_from([0, 0, 1]),
        "stop_token_ids": st.sampled_from([None, [1, 2, 3, 4], [0]]),
    }
)


class SchedulerModel(RuleBasedStateMachine):
    """Prompts come from few tokens, so that many share a prefix; pools are small, so that many are preempted."""

    @initialize(
        num_blocks=st.integers(3, 20),
        block_size=st.integers(1, 4),
        prefix_cache=st.sampled_from([True, True, False]),
        depth=st.integers(0, 2),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 30),
        policy=st.sampled_from(["fcfs", "priority"]),
        threshold=st.sampled_from([0, 0, 1, 5]),
        drafts=st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {"most": st.integers(1, 6), "wrong": st.sampled_from([0, 0.1, 0.5]), "seed": st.integers(0, 9)}
            ),
        ),
        max_num_drafts=st.sampled_from([1, 4, 100]),
    )
    def start(
        self,
        num_blocks,
        block_size,
        prefix_cache,
        depth,
        max_num_seqs,
        spare_budget,
        policy,
        threshold,
        drafts,
        max_num_drafts,
    ):
        self.harness = Harness(
            num_blocks=num_blocks,
            block_size=block_size,
            prefix_cache=prefix_cache,
            depth=depth,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=MAX_MODEL_LEN,
            policy=policy,
            long_prefill_token_threshold=threshold,
            drafts=drafts,
            max_num_drafts=max_num_drafts if drafts else 0,
            max_queued_requests=MAX_QUEUED,
        )
        self.num_added = 0

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, requests):
        for fields in requests:
            self._add(**fields)

    def _add(self, shared, own, **fields):
        prompt = ([1, 2, 3, 1] * 4)[:shared] + own or [1]
        request_id = f"request-{self.num_added}"
        self.num_added += 1
        try:
            self.harness.add(request_id, prompt, **fields)
        except PromptTooLongError:
            assert len(prompt) > self.harness.pool.num_usable * self.harness.pool.block_size
        except QueueFullError:
            assert self.harness.scheduler.stats().num_waiting >= MAX_QUEUED

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.harness.step()

    @rule()
    def deliver(self):
        if self.harness.in_flight:
            self.harness.deliver()

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        request_id = f"request-{which % (self.num_added + 1)}"  # unknown, unfinished or finished
        self.harness.abort(request_id, request_id)

    @rule(which=st.integers(0, 100))
    def fail(self, which):
        self.harness.device.failing.add(f"request-{which % (self.num_added + 1)}")

    @rule()
    def forget_prefixes(self):
        self.harness.scheduler.reset_prefix_cache()

    @invariant()
    def books_balance(self):
        self.harness.scheduler.check_integrity()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.run()
            for request_id in self.harness.deltas:
                self.harness.check_answer(request_id)


TestSchedulerModel = SchedulerModel.TestCase
TestSchedulerModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
