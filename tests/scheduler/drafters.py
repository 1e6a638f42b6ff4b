"""`HalfRight`: a drafter that knows what comes next, and is wrong now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxserve.request import EngineRequest
from jaxserve.scheduler.draft_planner import DraftRoom
from tests.scheduler.paged_device import VOCAB_SIZE, prefix_hashes, sampled


def true_continuation(request: EngineRequest, token_ids: list[int], count: int) -> list[int]:
    """What the request says after these tokens."""
    token_ids = list(token_ids)
    for _ in range(count):
        token_ids.append(sampled(prefix_hashes(token_ids, request)[-1]))
    return token_ids[len(token_ids) - count :]


class HalfRight:
    """Drafts up to `most` tokens a row, each wrong with probability `wrong`; draws from its own seeded numbers."""

    def __init__(self, requests: dict[str, EngineRequest], *, most: int, wrong: float = 0.3, seed: int = 0) -> None:
        self.num_steps_seen = 0
        self.released: list[str] = []
        self._requests = requests
        self._most = most
        self._wrong = wrong
        self._random = random.Random(seed)

    def draft(self, rooms: Sequence[DraftRoom], *, num_tokens: int, max_drafts: int) -> dict[int, list[int]]:
        assert num_tokens > 0
        drafts = {}
        for index, room in enumerate(rooms):
            count = min(self._random.randint(0, self._most), room.max_drafts, max_drafts)
            if count:
                request = self._requests[room.request_id]
                right = true_continuation(request, room.token_ids, room.num_ahead + count)[room.num_ahead :]
                drafts[index] = [self._spoilt(token_id) for token_id in right]
                max_drafts -= count
        return drafts

    def learn(self, request_id: str, *, num_drafts: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafts

    def observe(self, *, num_tokens: int, has_drafts: bool, duration_s: float) -> None:
        self.num_steps_seen += 1

    def release(self, request_id: str) -> None:
        self.released.append(request_id)

    def _spoilt(self, token_id: int) -> int:
        return (token_id + 1) % VOCAB_SIZE if self._random.random() < self._wrong else token_id
