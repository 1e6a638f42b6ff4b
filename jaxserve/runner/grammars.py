"""`SlotGrammars`: the matchers of slots whose requests have a grammar, and the masks that a step needs of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxserve.runner.batch import HostStep
from jaxserve.runner.drafts import DraftIds
from jaxserve.runner.pending import PendingStep
from jaxserve.sampling.inputs import TokenMasks
from jaxserve.scheduler.plan import NewSlot, RowError, StepPlan, StepResult
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.matcher import GrammarMatcher


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who has a slot, and where its answer begins."""

    request_id: str
    num_prompt_tokens: int
    matcher: GrammarMatcher


class SlotGrammars:
    """Keeps a matcher for each such slot, and moves it on by the tokens that its steps bring.

    A mask needs the tokens before it, of which the last may be on the device. So it is made when the model's pass over
    that token is on its way there, and the sampler, which reads the mask, is not:

    # device   | sample 1 | forward 2 ........... | sample 2
    # host     forward 2 | tokens of 1 -> masks of 2 | sample 2

    Drafts that the device draws are masked in the same way, each behind those before it.
    """

    def __init__(self, compiler: GrammarCompiler | None = None) -> None:
        self._compiler = compiler
        self._owners: dict[int, _Owner] = {}  # by slot
        self._slots: dict[str, int] = {}  # by request
        self._unsettled: list[_WatchedStep] = []
        self._errors: dict[int, dict[int, str]] = {}  # step -> row -> why it has no mask

    def occupy(self, new: NewSlot) -> None:
        """A request takes a slot, with what it has said before it lost another one."""
        if (left := self._owners.pop(new.slot, None)) is not None:
            self._slots.pop(left.request_id, None)
        grammar = new.sampling_params.structured_outputs_grammar
        if grammar is None:
            return
        if self._compiler is None:
            raise ValueError("a request with a grammar came to a runner without a compiler for it")
        output = new.token_ids[new.num_prompt_tokens :]
        matcher = self._compiler.matcher(grammar, new.stop_token_ids, output)
        self._owners[new.slot] = _Owner(new.request_id, new.num_prompt_tokens, matcher)
        self._slots[new.request_id] = new.slot

    def masks(self, plan: StepPlan, step: HostStep, draft_ids: DraftIds) -> TokenMasks | None:
        """Masks of the places of a plan's rows that have a grammar, None without such rows.

        Waits for the steps in flight, and for the drafts of this one where the device draws them.
        """
        matchers = self._matchers_of(plan)
        if not matchers or self._compiler is None:
            return None
        self._settle()
        drafts = draft_ids.fetch()
        masks = self._compiler.masks.make([(matcher, drafts.get(row, ())) for row, matcher in matchers.items()])
        errors = {row: matcher.error for row, matcher in matchers.items() if matcher.error}
        if errors:
            self._errors[plan.step_id] = errors
        order = np.argsort(step.sample_rows, kind="stable")
        has_mask = np.isin(step.sample_rows[order], list(matchers))
        return TokenMasks(step.places[order][has_mask], masks)

    def draft_masks(self, plan: StepPlan, places: Mapping[int, int], drawn: DraftIds) -> TokenMasks | None:
        """Masks for drawing the next draft of some of a plan's rows, None without a grammar among them.

        `places`: row -> where it is drawn; `drawn`: the step's drafts so far, which are waited for, as are the steps in
        flight.
        """
        matchers = {row: matcher for row, matcher in self._matchers_of(plan).items() if row in places}
        if not matchers or self._compiler is None:
            return None
        self._settle()
        drafts = drawn.fetch()
        masks = self._compiler.masks.make(
            [(matcher.behind(drafts.get(row, ())), ()) for row, matcher in matchers.items()]
        )
        return TokenMasks(np.array([places[row] for row in matchers]), masks)

    def watch(self, plan: StepPlan, pending: PendingStep) -> PendingStep:
        """The same step, which tells the matchers of its tokens before it tells anybody else."""
        matchers = self._matchers_of(plan)
        if not matchers:
            return pending
        watched = _WatchedStep(pending, matchers, self._errors.pop(plan.step_id, {}))
        self._unsettled = [earlier for earlier in self._unsettled if not earlier.is_settled]
        self._unsettled.append(watched)
        return watched

    def cut(self, request_id: str, num_tokens: int, token_ids: list[int]) -> list[int]:
        """As many of the guesses for what follows a request's first `num_tokens` as its grammar can take.

        All of them where that is not known: without a grammar, or when the matcher stands elsewhere.
        """
        owner = self._owners.get(self._slots.get(request_id, -1))
        if owner is None or owner.num_prompt_tokens + owner.matcher.num_tokens != num_tokens:
            return token_ids
        return token_ids[: owner.matcher.count_valid(token_ids)]

    def _settle(self) -> None:
        """Wait for the steps in flight, whose tokens move matchers on."""
        for earlier in self._unsettled:
            earlier.result()
        self._unsettled.clear()

    def _matchers_of(self, plan: StepPlan) -> dict[int, GrammarMatcher]:
        """Row -> matcher, of the rows that yield a token, in the order of the rows."""
        owners = self._owners
        if not owners:
            return {}
        rows = enumerate(zip(plan.slots, plan.samples, strict=True))
        return {row: owners[slot].matcher for row, (slot, samples) in rows if samples and slot in owners}


class _WatchedStep:
    """A step whose tokens move matchers on, once, whoever asks for its result first.

    It holds the matchers themselves: by the time its tokens are there another request may have the slot.
    """

    def __init__(self, pending: PendingStep, matchers: dict[int, GrammarMatcher], errors: dict[int, str]) -> None:
        self._pending = pending
        self._matchers = matchers
        self._errors = errors
        self._result: StepResult | None = None

    @property
    def is_settled(self) -> bool:
        return self._result is not None

    def is_ready(self) -> bool:
        return self.is_settled or self._pending.is_ready()

    def result(self) -> StepResult:
        if self._result is None:
            result = self._result = self._pending.result()
            for row, message in self._errors.items():
                result.token_ids[row] = []
                result.logprobs.pop(row, None)
                result.errors[row] = RowError(f"structured_outputs: {message}", taints_blocks=False, is_by_request=True)
            for row, matcher in self._matchers.items():
                matcher.consume(result.token_ids[row])
        return self._result
