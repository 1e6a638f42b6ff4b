"""`RunnerProposer`: leaves the guess to a smaller model or a head in the runner, which draws it in the same step."""

from __future__ import annotations

from jaxserve.speculative.proposer import Proposal


class RunnerProposer:
    """Proposes for every request as many tokens as it may."""

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """Placeholders."""
        return Proposal([0] * num_tokens, 1, is_known=False)

    def release(self, request_id: str) -> None:
        """Nothing is remembered."""
