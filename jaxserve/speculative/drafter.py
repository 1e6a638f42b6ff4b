"""`SpeculativeDrafter`: which guesses a step computes, from what they may bring and what the larger step costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from jaxserve.scheduler.draft_planner import DraftRoom
from jaxserve.speculative.acceptance import Rates, RequestAcceptance
from jaxserve.speculative.proposer import Proposer
from jaxserve.speculative.step_times import StepTimes

_MARGIN = 1.02  # a step with drafts must promise so many times the tokens a second of one without
# A request is idle when so many of its guesses in a row were not worth computing; more than the plain steps in a row
# that show once more what such steps take.
_IDLE_GUESSES = 16
_MAX_IDLE_ASKED = 16  # idle ones a step, since a guess costs microseconds
_ASK_ALL_STEPS = 64  # so often all are asked, since drafts of many rows together may pay where those of few do not


@dataclass(frozen=True, slots=True)
class _Guess:
    """Drafts for one row, with the chance of each that it and all before it hold."""

    index: int  # of its room
    token_ids: list[int]
    chances: list[float]


class SpeculativeDrafter:
    """The scheduler's `Drafter`: asks a proposer, and weighs its proposals against each other and against the clock.

    Draft tokens are taken in order of their chance to hold, up to the padded step size that promises most tokens a
    second. So a request whose guesses fail gets none, a full batch whose step would take longer gets none, and places
    that would be padding are filled. Nor is anybody asked for guesses where the step would be too long even if all
    held, and in a large batch few of those whose last ones were not worth it.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        max_tokens: int,
        step_sizes: Sequence[int],
        is_adaptive: bool,
        max_len: int | None = None,
        drafts_for_prompts: bool = True,
    ) -> None:
        """`max_len`: tokens of a sequence beyond which no draft lies; `drafts_for_prompts`: whether a row may have
        drafts in the step that computes the end of its prompt."""
        self._proposer = proposer
        self._drafts_for_prompts = drafts_for_prompts
        self._max_tokens = max_tokens  # drafts a row
        self._max_len = max_len
        self._is_adaptive = is_adaptive
        self._times = StepTimes(step_sizes)
        self._rates = Rates()
        self._acceptance: dict[str, RequestAcceptance] = {}
        self._num_misses: dict[str, int] = {}  # guesses since the last one that was computed
        self._num_steps = 0

    def draft(self, rooms: Sequence[DraftRoom], *, num_tokens: int, max_drafts: int) -> dict[int, list[int]]:
        """See `Drafter.draft`."""
        if self._is_adaptive and not self._best_count([1.0] * max_drafts, len(rooms), num_tokens):
            self._times.fade(has_drafts=True)
            return {}
        asked = self._asked(rooms) if self._is_adaptive else range(len(rooms))
        guesses = [guess for index in asked if (guess := self._guess(index, rooms[index])) is not None]
        lengths = self._lengths(guesses, len(rooms), num_tokens, max_drafts)
        for index in asked:
            request_id = rooms[index].request_id
            self._num_misses[request_id] = 0 if lengths[index] else self._num_misses.get(request_id, 0) + 1
        for guess in guesses:
            if not lengths[guess.index]:
                self._acceptance[rooms[guess.index].request_id].pass_over()
        return {guess.index: guess.token_ids[: lengths[guess.index]] for guess in guesses if lengths[guess.index]}

    def learn(self, request_id: str, *, num_drafts: int, num_accepted: int) -> None:
        """See `Drafter.learn`."""
        if acceptance := self._acceptance.get(request_id):
            acceptance.judge(num_drafts, num_accepted)

    def observe(self, *, num_tokens: int, has_drafts: bool, duration_s: float) -> None:
        """See `Drafter.observe`."""
        self._times.add(num_tokens, has_drafts, duration_s)

    def release(self, request_id: str) -> None:
        """See `Drafter.release`."""
        self._proposer.release(request_id)
        self._acceptance.pop(request_id, None)
        self._num_misses.pop(request_id, None)

    def _asked(self, rooms: Sequence[DraftRoom]) -> Sequence[int]:
        """Who is asked for a guess: everybody who is not idle, and of the others some in turn."""
        self._num_steps += 1
        misses = self._num_misses
        idle = [index for index, room in enumerate(rooms) if misses.get(room.request_id, 0) >= _IDLE_GUESSES]
        if len(idle) <= _MAX_IDLE_ASKED or self._num_steps % _ASK_ALL_STEPS == 0:
            return range(len(rooms))
        first = self._num_steps * _MAX_IDLE_ASKED % len(idle)
        passed_over = {*(idle[first:] + idle[:first])[_MAX_IDLE_ASKED:]}
        return [index for index in range(len(rooms)) if index not in passed_over]

    def _lengths(self, guesses: Sequence[_Guess], num_rows: int, num_tokens: int, max_drafts: int) -> Counter[int]:
        """How many drafts each room gets, by its index."""
        if not guesses:
            return Counter()
        # Stable: of equal chances those of one guess stay in order, and the oldest request comes first.
        ladder = sorted(
            ((chance, guess.index) for guess in guesses for chance in guess.chances), key=lambda entry: -entry[0]
        )[:max_drafts]
        count = len(ladder)
        if self._is_adaptive:
            count = self._best_count([chance for chance, _ in ladder], num_rows, num_tokens)
            self._times.fade(has_drafts=not count)
        return Counter(index for _, index in ladder[:count])

    def _guess(self, index: int, room: DraftRoom) -> _Guess | None:
        acceptance = self._acceptance.get(room.request_id)
        if acceptance is None:
            acceptance = self._acceptance[room.request_id] = RequestAcceptance(self._rates)
        acceptance.follow(room.token_ids)
        if not (room.is_decode or self._drafts_for_prompts):
            return None
        num_tokens = room.num_ahead + min(self._max_tokens, room.max_drafts)
        if self._max_len is not None:
            num_tokens = min(num_tokens, self._max_len - len(room.token_ids))
            if num_tokens <= room.num_ahead:
                return None
        proposal = self._proposer.propose(room.request_id, room.token_ids, num_tokens)
        if proposal is None or len(proposal.token_ids) <= room.num_ahead:
            return None
        acceptance.watch(proposal, len(room.token_ids))
        chances = acceptance.chances(proposal.strength, len(proposal.token_ids))
        num_drafts = len(proposal.token_ids) - room.num_ahead
        # A known guess starts at the tokens in flight: drafts behind them hold only if it is right about those.
        chances = chances[room.num_ahead :] if proposal.is_known else chances[:num_drafts]
        token_ids = proposal.token_ids[room.num_ahead :]
        return _Guess(index, token_ids, chances)

    def _best_count(self, chances: list[float], num_rows: int, num_tokens: int) -> int:
        """How many drafts, likeliest first, make for most tokens a second; 0 where none do."""
        times = self._times
        plain_s = times.plain(times.size_of(num_tokens))
        if plain_s is None:
            return 0  # the step is plain, and shows what such a step takes
        gains = [0.0, *accumulate(chances)]
        best_rate, best_count = _MARGIN * num_rows / plain_s, 0
        for size in times.sizes:
            count = min(size - num_tokens, len(chances))
            if count > 0:
                rate = (num_rows + gains[count]) / times.drafted(size, plain_s)
                if rate > best_rate:
                    best_rate, best_count = rate, count
                if count == len(chances):
                    break
        return best_count
