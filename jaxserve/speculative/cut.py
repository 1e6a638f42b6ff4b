"""`CutProposer`: another proposer's guesses, as far as a rule takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jaxserve.speculative.proposer import Proposal, Proposer

Cut = Callable[[str, int, list[int]], list[int]]  # request, its tokens so far, guesses -> those that may be right


class CutProposer:
    """Ends a guess where it cannot hold; what the runner will guess has no tokens yet and passes."""

    def __init__(self, inner: Proposer, cut: Cut) -> None:
        self._inner = inner
        self._cut = cut

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """See `Proposer.propose`; fewer tokens than asked for where the rule forbids the next."""
        proposal = self._inner.propose(request_id, token_ids, num_tokens)
        if proposal is None or not proposal.is_known:
            return proposal
        kept = self._cut(request_id, len(token_ids), proposal.token_ids)
        return replace(proposal, token_ids=kept) if kept else None

    def release(self, request_id: str) -> None:
        """See `Proposer.release`."""
        self._inner.release(request_id)
