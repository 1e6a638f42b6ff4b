"""`NgramProposer`: what followed the last tokens where they stood before (prompt lookup; Saxena, 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from jaxserve.speculative.proposer import Proposal

_Ngrams: TypeAlias = dict[tuple[int, ...], int]  # some tokens -> position behind the last place where they stand


class NgramProposer:
    """Remembers of each request where every run of `min_tokens` to `max_tokens` tokens stood last."""

    def __init__(self, *, min_tokens: int, max_tokens: int) -> None:
        self._sizes = range(max_tokens, min_tokens - 1, -1)
        self._indices: dict[str, NgramIndex] = {}

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """What followed the longest run that ends the sequence and stood in it before; strength: the run's length."""
        index = self._indices.get(request_id)
        if index is None:
            index = self._indices[request_id] = NgramIndex(self._sizes)
        return index.propose(token_ids, num_tokens)

    def release(self, request_id: str) -> None:
        """Forget the request."""
        self._indices.pop(request_id, None)


@dataclass(slots=True)
class NgramIndex:
    """One sequence's runs of tokens. A run goes in when the token behind it is known, so the last ones are not in it.

    # tokens              5 7 9 5 7 . 5 7
    # runs of two         (5 7) -> 5, not yet 8; (7 9) -> 3; ...
    # proposed: tokens from position 5 on
    """

    sizes: range  # lengths of runs, longest first
    _runs: dict[int, _Ngrams] = field(default_factory=dict)  # by length
    _num_indexed: int = 0  # positions that runs may have behind them: all below

    def propose(self, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """See `NgramProposer.propose`."""
        self._extend(token_ids)
        for size in self.sizes:
            begin = self._runs[size].get(tuple(token_ids[-size:]))
            if begin is not None:
                return Proposal(_copied(token_ids, begin, num_tokens), size)
        return None

    def _extend(self, token_ids: list[int]) -> None:
        """Index what is new: of each length the runs with tokens up to the last but one."""
        for size in self.sizes:
            first = max(self._num_indexed - size, 0)
            new = token_ids[first:-1]
            runs = zip(*(new[offset:] for offset in range(size)), strict=False)
            self._runs.setdefault(size, {}).update(zip(runs, range(first + size, len(token_ids)), strict=False))
        self._num_indexed = len(token_ids)


def _copied(token_ids: list[int], begin: int, num_tokens: int) -> list[int]:
    """The tokens from `begin` on; behind the last one the copy goes on in itself, as a loop would.

    >>> _copied([1, 2, 3], 1, 5)
    [2, 3, 2, 3, 2]
    """
    copied = token_ids[begin : begin + num_tokens]
    period = len(token_ids) - begin
    while len(copied) < num_tokens:
        copied.append(copied[len(copied) - period])
    return copied
