"""`GrammarMatcher`: one sequence's way through its grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llguidance import LLMatcher

MAX_ERROR_CHARS = 500


class GrammarMatcher:
    """Knows what may come next. What goes wrong (a limit, mostly) is kept in `error`, and nothing is raised.

    # tokens   { " a " : 3 } | end        ended: from here on only end tokens may follow
    #                   is_accepting
    """

    def __init__(self, matcher: LLMatcher, end_ids: Iterable[int]) -> None:
        """`end_ids` may follow where the grammar is satisfied, and end it: EOS, and what else stops the sequence."""
        self.inner = matcher
        self.end_ids = frozenset(end_ids)
        self.has_ended = False
        self.num_tokens = 0  # taken in so far

    @property
    def error(self) -> str:
        """Why nothing can follow, on one line; "" where all is well."""
        if not self.inner.is_error():
            return ""
        return " ".join(self.inner.get_error().removesuffix("<non-verbose/>").split())[:MAX_ERROR_CHARS]

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on by some tokens of the sequence."""
        self.num_tokens += len(token_ids)
        for token_id in token_ids:
            if self.has_ended or self.inner.is_error():
                return
            if token_id in self.end_ids and self.inner.is_accepting():
                self.has_ended = True
            else:
                self.inner.consume_token(token_id)

    def behind(self, token_ids: Sequence[int]) -> GrammarMatcher:
        """Another one that has gone on by these tokens, with errors of its own; the lexer's limits are shared."""
        ahead = GrammarMatcher(self.inner.deep_copy(), self.end_ids)
        ahead.has_ended, ahead.num_tokens = self.has_ended, self.num_tokens
        ahead.consume(token_ids)
        return ahead

    def count_valid(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other; the matcher stays where it is."""
        return 0 if self.has_ended else self.inner.validate_tokens(list(token_ids))
