"""`DraftPlanner`: lets rows of a planned step compute guessed tokens as well, and counts how many of them held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxserve.scheduler.block_tables import BlockTables
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.scheduled_request import ScheduledRequest
from jaxserve.scheduler.settings import DraftCounts, SchedulerSettings


class DraftRoom(NamedTuple):
    """A row that may compute drafts behind its own tokens. A tuple, since each row of each step has one."""

    request_id: str
    token_ids: list[int]  # what the host knows of the sequence; the scheduler's own list, not to be kept
    num_ahead: int  # tokens between these and the first draft that the host does not know yet, this step's included
    max_drafts: int
    is_decode: bool = True  # whether the row has one token of its own, behind some that it computed in earlier steps


class Drafter(Protocol):
    """Guesses how sequences go on, and how much guessing pays. A wrong guess costs time and nothing else."""

    def draft(self, rooms: Sequence[DraftRoom], *, num_tokens: int, max_drafts: int) -> dict[int, list[int]]:
        """Index of a room -> its drafts, where there are any, `max_drafts` in all; the step has `num_tokens` so far."""
        ...

    def learn(self, request_id: str, *, num_drafts: int, num_accepted: int) -> None:
        """What became of a row's drafts; unknown ids are passed over."""
        ...

    def observe(self, *, num_tokens: int, has_drafts: bool, duration_s: float) -> None:
        """How long a step took."""
        ...

    def release(self, request_id: str) -> None:
        """The request has ended, or will start anew."""
        ...


class NoDrafter:
    """Never guesses."""

    def draft(self, rooms: Sequence[DraftRoom], *, num_tokens: int, max_drafts: int) -> dict[int, list[int]]:
        """Nothing."""
        return {}

    def learn(self, request_id: str, *, num_drafts: int, num_accepted: int) -> None:
        """Nothing to learn."""

    def observe(self, *, num_tokens: int, has_drafts: bool, duration_s: float) -> None:
        """Nothing to learn."""

    def release(self, request_id: str) -> None:
        """Nothing to forget."""


class DraftPlanner:
    """Drafts take what a step has left when every row has its own: tokens of the budget, places to sample, blocks.

    A row's new length is known when its result is, so nothing is planned while drafts are in flight.

    # row without drafts   | ... t | -> 1 token
    # row with two drafts  | ... t | d1 d2 | -> t's successor; d2's place if that was d1; one more if that was d2
    """

    def __init__(self, settings: SchedulerSettings, tables: BlockTables, drafter: Drafter) -> None:
        self.counts = DraftCounts()
        self._settings = settings
        self._tables = tables
        self._drafter = drafter
        self._num_steps_in_flight = 0  # with drafts

    @property
    def are_in_flight(self) -> bool:
        """Whether some request's length is not known."""
        return self._num_steps_in_flight > 0

    def extend(self, plan: StepPlan, rows: Sequence[ScheduledRequest], budget: int) -> None:
        """Add drafts to a plan that is complete but for them; `budget` is what is left of the step's tokens."""
        max_drafts = min(self._settings.max_num_drafts, budget)
        if max_drafts <= 0:
            return
        newcomers = {new.slot for new in plan.new_slots}
        owners: list[int] = []
        rooms: list[DraftRoom] = []
        for row, request in enumerate(rows):
            limit = min(
                request.max_total_tokens - request.num_tokens,
                self._settings.max_tokens_per_row - plan.num_tokens[row],
            )
            if plan.samples[row] and limit > 0:
                owners.append(row)
                rooms.append(
                    DraftRoom(
                        request_id=request.request_id,
                        token_ids=request.token_ids,
                        num_ahead=request.num_in_flight - 1,
                        max_drafts=limit,
                        is_decode=plan.num_tokens[row] == 1 and request.slot not in newcomers,
                    )
                )
        drafts = self._drafter.draft(rooms, num_tokens=plan.total_num_tokens, max_drafts=max_drafts)
        for index, draft_ids in drafts.items():
            self._add(owners[index], rows[owners[index]], draft_ids, plan, num_reserved=len(rows))
        self._num_steps_in_flight += bool(plan.drafts)

    def settle(self, plan: StepPlan, result: StepResult) -> None:
        """A step's result is there: count what held."""
        for row, draft_ids in plan.drafts.items():
            num_accepted = max(0, len(result.token_ids[row]) - 1)
            self.counts = self.counts.plus(len(draft_ids), num_accepted)
            self._drafter.learn(plan.request_ids[row], num_drafts=len(draft_ids), num_accepted=num_accepted)
        self._num_steps_in_flight -= bool(plan.drafts)

    def observe(self, *, num_tokens: int, has_drafts: bool, duration_s: float) -> None:
        """Tell the drafter how long a step took, of all data shards together."""
        self._drafter.observe(num_tokens=num_tokens, has_drafts=has_drafts, duration_s=duration_s)

    def release(self, request: ScheduledRequest) -> None:
        """The request has ended."""
        self._drafter.release(request.request_id)

    def _add(
        self, row: int, request: ScheduledRequest, draft_ids: list[int], plan: StepPlan, *, num_reserved: int
    ) -> None:
        """Put drafts behind a row; those that would need a block somebody may soon want are left out."""
        end = plan.starts[row] + plan.num_tokens[row]
        if end + len(draft_ids) > request.num_block_tokens:
            block_ids = self._tables.grow(request, end + len(draft_ids), num_reserved)
            if block_ids is None:
                draft_ids = draft_ids[: request.num_block_tokens - end]
            else:
                plan.new_blocks.append((request.slot, block_ids))
        if draft_ids:
            plan.num_tokens[row] += len(draft_ids)
            plan.drafts[row] = draft_ids
