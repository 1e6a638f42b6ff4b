"""`NgramProposer`: what followed the last tokens where they stood before (prompt lookup; Saxena, 2023)."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from jaxserve.speculative.proposer import Proposal

_BITS64 = 2**64 - 1
_POSITION = 2**32 - 1  # the half of an entry that is not the run's hash
_MIN_FOLD = 128  # tokens that a dict takes in sooner than a sorted array is made anew
_FOLD_PART = 8  # of the sequence: where more than this part of it is in the dict, it goes into the arrays


class NgramProposer:
    """Remembers of each request where every run of `min_tokens` to `max_tokens` tokens stood last."""

    def __init__(self, *, min_tokens: int, max_tokens: int) -> None:
        # Drawn anew in every process: nobody can write a prompt whose runs all have one hash.
        factors = tuple(secrets.randbits(64) | 1 for _ in range(max_tokens))
        self._runs = Runs(min_tokens, factors)
        self._indices: dict[str, NgramIndex] = {}

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """What followed the longest run that ends the sequence and stood in it before; strength: the run's length."""
        index = self._indices.get(request_id)
        if index is None:
            index = self._indices[request_id] = NgramIndex(self._runs)
        return index.propose(token_ids, num_tokens)

    def release(self, request_id: str) -> None:
        """Forget the request."""
        self._indices.pop(request_id, None)


@dataclass(frozen=True, slots=True)
class Runs:
    """Which runs of tokens are looked up, and the hash of each: the sum of its tokens, each times its place's factor.

    The upper bits of such a sum collide as seldom as random ones where the factors are random. Token ids count from 1
    in it, so that runs of different lengths differ.
    """

    min_tokens: int
    factors: tuple[int, ...]  # odd, below 2**64: of a run's last token, of the one before ...

    def keys(self, token_ids: list[int], end: int) -> list[int]:
        """Hashes of the runs in front of `end`, from the shortest on, as far as they begin in the sequence.

        >>> Runs(2, (1, 10, 100)).keys([3, 4, 5], 3)
        [56, 456]
        """
        run = token_ids[max(end - len(self.factors), 0) : end]
        run.reverse()
        keys, key = [], 0
        for token_id, factor in zip(run, self.factors, strict=False):
            key = (key + (token_id + 1) * factor) & _BITS64
            keys.append(key)
        return keys[self.min_tokens - 1 :]

    def tables(self, token_ids: list[int]) -> list[memoryview]:
        """Of each length, from the shortest on, all runs in ascending order: upper half of the hash, position behind.

        >>> [hex(entry) for entry in Runs(1, (2**32,)).tables([3, 4])[0]]
        ['0x400000001', '0x500000002']
        """
        tokens = np.array(token_ids, np.uint64) + np.uint64(1)
        keys = np.zeros(len(tokens) + 1, np.uint64)  # of the runs in front of positions size .. len(tokens)
        tables = []
        for size, factor in enumerate(self.factors, start=1):
            keys = keys[1:] + tokens[: len(keys) - 1] * np.uint64(factor)
            if size >= self.min_tokens:
                ends = np.arange(size, size + len(keys), dtype=np.uint64)
                tables.append(np.sort((keys & np.uint64(_BITS64 ^ _POSITION)) | ends).data)
        return tables


@dataclass(slots=True)
class NgramIndex:
    """One sequence's runs of tokens. A run goes in when the token behind it is known, so the last ones are not in it.

    # tokens              5 7 9 5 7 . 5 7
    # runs of two         (5 7) -> 5, not yet 8; (7 9) -> 3; ...
    # proposed: tokens from position 5 on

    Sorted arrays hold most of it, 8 bytes a run, and a dict what came since they were made.
    """

    _runs: Runs
    _tables: list[memoryview] = field(default_factory=list)  # u64, see `Runs.tables`
    _num_in_tables: int = 0  # positions that runs in the tables may have behind them: all below
    _latest: dict[int, int] = field(default_factory=dict)  # hash of a run -> position behind it
    _num_indexed: int = 1  # positions that runs in tables and dict may have behind them: all below

    def propose(self, token_ids: list[int], num_tokens: int) -> Proposal | None:
        """See `NgramProposer.propose`."""
        self._extend(token_ids)
        begin, strength = 0, 0
        # Where a run stood its end stood, too: the shortest that did not ends the search.
        for place, key in enumerate(self._runs.keys(token_ids, len(token_ids))):
            size = self._runs.min_tokens + place
            found = self._find(token_ids, place, size, key)
            if found is None:
                break
            begin, strength = found, size
        return Proposal(_copied(token_ids, begin, num_tokens), strength) if strength else None

    def _find(self, token_ids: list[int], place: int, size: int, key: int) -> int | None:
        """The position behind the last place where the sequence's last `size` tokens stood before."""
        run = token_ids[-size:]
        position = self._latest.get(key)
        if position is not None and token_ids[position - size : position] == run:
            return position
        if not self._tables:
            return None
        table = self._tables[place]
        index = bisect_right(table, key | _POSITION) - 1
        while index >= 0 and table[index] | _POSITION == key | _POSITION:
            position = table[index] & _POSITION
            if token_ids[position - size : position] == run:
                return position
            index -= 1  # a run of the same hash
        return None

    def _extend(self, token_ids: list[int]) -> None:
        """Index what is new: the runs in front of all positions up to the last token's."""
        if len(token_ids) - self._num_in_tables > max(_MIN_FOLD, len(token_ids) // _FOLD_PART):
            self._tables = self._runs.tables(token_ids[:-1])
            self._latest.clear()
            self._num_in_tables = self._num_indexed = len(token_ids)
        for end in range(self._num_indexed, len(token_ids)):
            for key in self._runs.keys(token_ids, end):
                self._latest[key] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))


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
