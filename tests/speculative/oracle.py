"""`Oracle`: a proposer that has read the answers, and garbles some of its guesses."""

from __future__ import annotations

import random

from jaxserve.speculative.proposer import Proposal


class Oracle:
    """Guesses from whole sequences (prompt and answer); each token is wrong with probability `wrong`."""

    def __init__(self, sequences: list[list[int]], *, vocab_size: int, wrong: float = 0.25, seed: int = 0) -> None:
        self.num_proposals = 0
        self._sequences = sequences
        self._vocab_size = vocab_size
        self._wrong = wrong
        self._random = random.Random(seed)

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """What follows in the first sequence that begins so; past its end, and in unknown ones, anything."""
        known = next((s for s in self._sequences if s[: len(token_ids)] == token_ids), token_ids)
        following = known[len(token_ids) : len(token_ids) + num_tokens]
        guess = [self._any() if self._random.random() < self._wrong else token_id for token_id in following]
        self.num_proposals += 1
        return Proposal(guess + [self._any() for _ in range(num_tokens - len(guess))], 1)

    def release(self, request_id: str) -> None:
        pass

    def _any(self) -> int:
        return self._random.randrange(3, self._vocab_size)
