"""`Proposer`: who guesses the next tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow, and how much speaks for them."""

    token_ids: list[int]
    strength: int  # of the proposer's own scale: proposals of one strength turn out right about equally often
    is_known: bool = True  # False: the tokens are placeholders, the runner makes the guess when it has all before it


class Proposer(Protocol):
    """Guesses on the host, in microseconds a request; its guesses decide how fast an answer comes, never what it is."""

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """`num_tokens` tokens to follow `token_ids`, the whole sequence so far, or None where nothing suggests itself.

        From one call to the next a request's tokens only grow, until `release`.
        """
        ...

    def release(self, request_id: str) -> None:
        """The request has ended; unknown ids are passed over."""
        ...
