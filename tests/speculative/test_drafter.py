"""What is drafted follows acceptance and the clock."""

from __future__ import annotations

import random

from jaxserve.scheduler.draft_planner import DraftRoom
from jaxserve.speculative.acceptance import Rates, RequestAcceptance
from jaxserve.speculative.drafter import SpeculativeDrafter
from jaxserve.speculative.in_runner import RunnerProposer
from jaxserve.speculative.proposer import Proposal
from jaxserve.speculative.step_times import StepTimes

SIZES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


class Fixed:
    """Proposes 1, 2, 3 ... for every request but those named "silent"."""

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        if request_id.startswith("silent"):
            return None
        return Proposal(list(range(1, num_tokens + 1)), 2)

    def release(self, request_id: str) -> None:
        pass


def make(*, max_tokens: int = 4, is_adaptive: bool = True) -> SpeculativeDrafter:
    return SpeculativeDrafter(Fixed(), max_tokens=max_tokens, step_sizes=SIZES, is_adaptive=is_adaptive)


def room(
    request_id: str, *, num_ahead: int = 0, max_drafts: int = 100, token_ids: list[int] | None = None
) -> DraftRoom:
    token_ids = [9] if token_ids is None else token_ids
    return DraftRoom(request_id=request_id, token_ids=token_ids, num_ahead=num_ahead, max_drafts=max_drafts)


def say(drafter: SpeculativeDrafter, request_id: str, *, right: bool, num_steps: int = 30) -> list[int]:
    """A request that says what was proposed (or never does), a token a step; what it has said."""
    token_ids = [9]
    for _ in range(num_steps):
        drafter.draft([room(request_id, token_ids=token_ids)], num_tokens=1, max_drafts=8)
        token_ids.append(len(token_ids) % 4 + 1 if right else 9)
    return token_ids


def measure(drafter: SpeculativeDrafter, step_s: dict[int, float]) -> None:
    for size, duration_s in step_s.items():
        for has_drafts in (False, True):
            for _ in range(3):
                drafter.observe(num_tokens=size, has_drafts=has_drafts, duration_s=duration_s)


FLAT = dict.fromkeys(SIZES, 0.01)
LINEAR = {size: 0.01 * size for size in SIZES}


def test_unmeasured_a_plain_step_comes_first_and_then_everything_is_tried():
    drafter = make()
    for _ in range(2):
        assert drafter.draft([room("a")], num_tokens=1, max_drafts=8) == {}
        drafter.observe(num_tokens=1, has_drafts=False, duration_s=0.01)
    assert drafter.draft([room("a")], num_tokens=1, max_drafts=8) == {0: [1, 2, 3, 4]}


def test_where_drafts_always_pay_a_plain_step_is_measured_now_and_then():
    drafter = make()
    measure(drafter, FLAT)
    num_plain = 0
    for _ in range(2000):
        has_drafts = bool(drafter.draft([room("a")], num_tokens=1, max_drafts=8))
        drafter.observe(num_tokens=5 if has_drafts else 1, has_drafts=has_drafts, duration_s=0.01)
        num_plain += not has_drafts
    assert 1 <= num_plain < 40


def test_limits_of_the_row_and_of_the_step_hold():
    drafter = make(is_adaptive=False)
    assert drafter.draft([room("a", max_drafts=2)], num_tokens=1, max_drafts=8) == {0: [1, 2]}
    drafts = drafter.draft([room("a"), room("silent"), room("b")], num_tokens=3, max_drafts=5)
    assert drafts.keys() <= {0, 2}
    assert sum(map(len, drafts.values())) == 5


def test_no_draft_lies_beyond_the_length_of_a_draft_model():
    drafter = SpeculativeDrafter(Fixed(), max_tokens=4, step_sizes=SIZES, is_adaptive=False, max_len=10)
    lengths = {}
    for num_tokens in range(5, 12):
        drafts = drafter.draft([room("a", token_ids=[9] * num_tokens, num_ahead=1)], num_tokens=1, max_drafts=8)
        lengths[num_tokens] = len(drafts.get(0, ()))
    assert lengths == {5: 4, 6: 3, 7: 2, 8: 1, 9: 0, 10: 0, 11: 0}


def test_tokens_in_flight_are_guessed_and_passed_over():
    drafter = make(is_adaptive=False)
    assert drafter.draft([room("a", num_ahead=1)], num_tokens=1, max_drafts=8) == {0: [2, 3, 4, 5]}


def test_where_a_larger_step_costs_nothing_even_bad_guesses_are_tried_and_where_it_costs_all_not_even_good_ones():
    for right in (True, False):
        drafter = make()
        measure(drafter, LINEAR)
        token_ids = say(drafter, "a", right=right)
        assert drafter.draft([room("a", token_ids=token_ids)], num_tokens=1, max_drafts=8) == {}
    drafter = make()
    measure(drafter, FLAT)
    assert drafter.draft([room("a")], num_tokens=1, max_drafts=8) == {0: [1, 2, 3, 4]}


def test_a_request_whose_guesses_fail_gets_none_and_one_whose_guesses_hold_gets_all():
    drafter = make()
    measure(drafter, {size: 0.01 + 0.001 * size for size in SIZES})
    bad, good = say(drafter, "bad", right=False), say(drafter, "good", right=True)
    rooms = [room("bad", token_ids=bad), room("good", token_ids=good)]
    assert drafter.draft(rooms, num_tokens=2, max_drafts=4) == {1: [1, 2, 3, 4]}
    assert drafter.draft(rooms[:1], num_tokens=1, max_drafts=4) == {}


def test_a_full_batch_gets_none_where_one_row_alone_would():
    knee = {size: 0.01 * max(1, size / 8) for size in SIZES}  # flat up to 8 tokens, then in proportion
    drafter = make()
    measure(drafter, knee)
    names = [f"r{index}" for index in range(16)]
    sequences = [say(drafter, name, right=True) for name in names]
    rooms = [room(name, token_ids=token_ids) for name, token_ids in zip(names, sequences, strict=True)]
    assert len(drafter.draft(rooms[:1], num_tokens=1, max_drafts=64)[0]) == 4
    full = drafter.draft(rooms, num_tokens=16, max_drafts=64)
    unlike = make()
    measure(unlike, knee)
    for name in names:
        say(unlike, name, right=False)
    rooms = [room(name, token_ids=[9] * 31) for name in names]
    assert unlike.draft(rooms, num_tokens=16, max_drafts=64) == {}
    assert sum(map(len, full.values())) in (0, 16, 48)  # whole steps, never one that is half padding


def blind() -> SpeculativeDrafter:
    drafter = SpeculativeDrafter(RunnerProposer(), max_tokens=4, step_sizes=SIZES, is_adaptive=True)
    measure(drafter, {size: 0.01 + 0.001 * size for size in SIZES})
    return drafter


def test_of_a_draft_model_the_results_are_learnt_and_a_bad_one_is_tried_again_some_day():
    drafter = blind()
    for _ in range(20):
        drafter.draft([room("a")], num_tokens=1, max_drafts=8)
        drafter.learn("a", num_drafts=4, num_accepted=0)
    waited = 0
    while not drafter.draft([room("a")], num_tokens=1, max_drafts=8):
        waited += 1
    assert 20 < waited < 500
    for _ in range(20):
        drafter.draft([room("a")], num_tokens=1, max_drafts=8)
        drafter.learn("a", num_drafts=4, num_accepted=4)
    assert drafter.draft([room("a")], num_tokens=1, max_drafts=8)
    drafter.learn("unknown", num_drafts=4, num_accepted=4)


def test_a_draft_model_sees_the_tokens_in_flight_and_need_not_guess_them():
    rooms = [[room("a", num_ahead=num_ahead)] for num_ahead in (0, 1)]
    known, in_flight = (blind().draft(each, num_tokens=1, max_drafts=8) for each in rooms)
    assert known == in_flight == {0: [0, 0, 0]}  # a step of four tokens


def test_one_bad_measurement_does_not_stay():
    drafter = make()
    measure(drafter, FLAT)
    for size in SIZES:
        for _ in range(3):
            drafter.observe(num_tokens=size, has_drafts=True, duration_s=0.05)
    token_ids = say(drafter, "a", right=True)
    waited = 0
    while not drafter.draft([room("a", token_ids=token_ids)], num_tokens=1, max_drafts=8):
        waited += 1
    assert waited < 500


def test_a_request_that_ended_is_forgotten():
    drafter = make()
    measure(drafter, {size: 0.01 + 0.001 * size for size in SIZES})
    say(drafter, "a", right=False)
    drafter.release("a")
    assert "a" not in drafter._acceptance


def test_rates_come_near_the_truth():
    numbers = random.Random(5)
    everyone = Rates()
    acceptance = RequestAcceptance(everyone)
    token_ids: list[int] = []
    for _ in range(2000):
        acceptance.follow(token_ids)
        acceptance.watch(Proposal([1, 1, 1], 3), len(token_ids))
        follows = numbers.random() < (0.9 if token_ids and token_ids[-1] == 1 else 0.3)
        token_ids.append(1 if follows else 0)
    first, second, third = acceptance.chances(3, 3)
    assert 0.3 < first < 0.9
    assert 0.75 < second / first < 1
    assert third / second == second / first


def test_what_was_proposed_is_settled_once_whether_it_came_in_one_step_or_many():
    at_once, one_by_one = RequestAcceptance(Rates()), RequestAcceptance(Rates())
    said = [1, 2, 7]
    for acceptance, lengths in ((at_once, [3]), (one_by_one, [1, 2, 3])):
        acceptance.watch(Proposal([1, 2, 3, 4], 2), 0)
        for length in lengths:
            acceptance.follow(said[:length])
            acceptance.watch(Proposal([5, 5, 5, 5], 2), length)
    assert at_once.everyone == one_by_one.everyone
    assert at_once.everyone.first[2].num_right == 1
    assert at_once.everyone.later.num_trials == 1.95


def test_the_first_step_of_a_kind_and_a_freak_do_not_decide():
    times = StepTimes(SIZES)
    times.add(3, False, 9.0)
    assert times.plain(4) is None
    times.add(3, False, 0.01)
    times.add(4, False, 100.0)
    assert times.plain(4) == 0.01 + 0.3 * 0.01
    assert times.drafted(8, 0.001) == times.plain(4)  # not measured: as a smaller one, so that it is tried


class Counted(Fixed):
    """Counts whom it was asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        self.asked.append(request_id)
        return super().propose(request_id, token_ids, num_tokens)


def asked_each_step(step_s: dict[int, float], names: list[str], num_steps: int) -> list[list[str]]:
    """Of a batch in which "good" alone says what is proposed."""
    proposer = Counted()
    drafter = SpeculativeDrafter(proposer, max_tokens=4, step_sizes=tuple(step_s), is_adaptive=True)
    measure(drafter, step_s)
    sequences: dict[str, list[int]] = {name: [9] for name in names}
    asked = []
    for _ in range(num_steps):
        rooms = [room(name, token_ids=said) for name, said in sequences.items()]
        drafts = drafter.draft(rooms, num_tokens=len(names), max_drafts=64)
        size = next(size for size in step_s if size >= len(names) + sum(map(len, drafts.values())))
        drafter.observe(num_tokens=size, has_drafts=bool(drafts), duration_s=step_s[size])
        asked.append(proposer.asked)
        proposer.asked = []
        for name, said in sequences.items():
            said.append(len(said) % 4 + 1 if name == "good" else 9)
    return asked


def test_in_a_large_batch_few_are_asked_of_those_whose_guesses_are_not_worth_it_and_all_in_turn():
    names = ["good", *(f"bad{index}" for index in range(39))]
    asked = asked_each_step({40: 0.01, 44: 0.0101, 64: 0.02, 128: 0.04}, names, 300)
    assert asked[0] == names
    assert all("good" in step for step in asked)
    lengths = [len(step) for step in asked[100:]]
    assert set(lengths) == {17, 40}
    assert lengths.count(40) == len(range(128, 300, 64))
    for first in range(200, 240):
        assert {name for step in asked[first : first + 5] for name in step} == set(names)


def test_nobody_is_asked_where_a_longer_step_would_not_pay_even_if_all_drafts_held():
    asked = asked_each_step({size: 0.01 * size**1.5 for size in SIZES}, ["good", "bad"], 20)
    assert asked == [[]] * 20
