"""How often guesses turn out right, learnt from what a sequence then says, whether they were computed or not."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.speculative.proposer import Proposal

_MEMORY = 0.95  # what a trial leaves of the weight of those before it: about the last 20 count
_FADE = 0.99  # what is left of a belief that kept a proposal from being tried
_PRIOR_TRIALS = 2.0  # weight of what is known of all requests, in the estimate for one


@dataclass(slots=True)
class Rate:
    """Right guesses in all guesses, the latest counting most."""

    num_right: float = 0.0
    num_trials: float = 0.0

    def add(self, is_right: bool) -> None:
        self.num_right = self.num_right * _MEMORY + is_right
        self.num_trials = self.num_trials * _MEMORY + 1

    def fade(self) -> None:
        """Believe it less."""
        self.num_right *= _FADE
        self.num_trials *= _FADE

    def given(self, prior: float) -> float:
        """The estimate, in (0, 1), where `prior` is what to believe without a trial.

        >>> Rate().given(0.5), Rate(num_right=2, num_trials=2).given(0.5)
        (0.5, 0.75)
        """
        return (self.num_right + _PRIOR_TRIALS * prior) / (self.num_trials + _PRIOR_TRIALS)


@dataclass(slots=True)
class Rates:
    """The first token of a proposal is right by its strength; those behind a right one are right more often."""

    first: dict[int, Rate] = field(default_factory=dict)  # by strength
    later: Rate = field(default_factory=Rate)

    def of_first(self, strength: int) -> Rate:
        """The rate of proposals of one strength."""
        return self.first.setdefault(strength, Rate())


@dataclass(slots=True)
class RequestAcceptance:
    """One request's proposals against its tokens.

    # proposed at 10:   a b c d
    # then said:        a b x      -> first right, later right, later wrong; the next proposal is watched from 13 on
    """

    everyone: Rates
    _own: Rates = field(default_factory=Rates)
    _watched: list[int] = field(default_factory=list)  # what is left of the proposal under watch
    _strength: int = 0
    _position: int = 0  # of the first of them
    _is_first: bool = True  # whether that is the proposal's first token
    _unknown: int | None = None  # strength of the last proposal, if its tokens are not known

    def follow(self, token_ids: list[int]) -> None:
        """Compare what is watched with what the sequence says by now."""
        said = token_ids[self._position : self._position + len(self._watched)]
        for index, token_id in enumerate(said):
            is_right = token_id == self._watched[index]
            self._add(self._strength, self._is_first, is_right)
            self._is_first = False
            if not is_right:
                self._watched = []
                return
        del self._watched[: len(said)]
        self._position += len(said)

    def watch(self, proposal: Proposal, position: int) -> None:
        """A proposal for the tokens from `position` on; passed over while an earlier one is not settled."""
        self._unknown = None if proposal.is_known else proposal.strength
        if proposal.is_known and not self._watched:
            self._watched = proposal.token_ids.copy()
            self._strength = proposal.strength
            self._position = position
            self._is_first = True

    def judge(self, num_tokens: int, num_right: int) -> None:
        """The first `num_tokens` of the last proposal were computed; one that nobody knows is settled by that."""
        if self._unknown is not None:
            for index in range(min(num_right + 1, num_tokens)):
                self._add(self._unknown, index == 0, index < num_right)

    def pass_over(self) -> None:
        """The last proposal was not computed: if nobody knows it, nothing is learnt, and some day it must be tried."""
        if self._unknown is not None:
            for rates in (self.everyone, self._own):
                rates.of_first(self._unknown).fade()
                rates.later.fade()

    def _add(self, strength: int, is_first: bool, is_right: bool) -> None:
        for rates in (self.everyone, self._own):
            (rates.of_first(strength) if is_first else rates.later).add(is_right)

    def chances(self, strength: int, num_tokens: int) -> list[float]:
        """For each of a proposal's tokens how likely it is that it and all before it are right."""
        first, later = self.everyone.of_first(strength), self.everyone.later
        chance = self._own.of_first(strength).given(first.given(0.5))
        factor = self._own.later.given(later.given(0.5))
        return [chance * factor**index for index in range(num_tokens)]
