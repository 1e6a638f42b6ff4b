"""Every padded shape of a step is chosen here: few enough to compile before serving, close enough to waste little."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One compiled shape: a step of up to `num_tokens` tokens in up to `num_rows` rows."""

    num_tokens: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The token buckets and the row buckets, both ascending.

    A step's rows are padded to the row bucket that holds min(token bucket, max_num_seqs). Row buckets are fewer: the
    head and the sampler are compiled for each in every variant, and cost little for rows that are padding.
    """

    token_sizes: tuple[int, ...]
    row_sizes: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        min_tokens: int = 1,
        token_sizes: Sequence[int] | None = None,
    ) -> Buckets:
        """Powers of two from `min_tokens` up to the token budget (or the sizes a user gave), and rows in steps of four.

        >>> Buckets.plan(max_num_batched_tokens=100, max_num_seqs=48, min_tokens=2)
        Buckets(token_sizes=(2, 4, 8, 16, 32, 64, 100), row_sizes=(2, 16, 48))
        """
        if token_sizes is None:
            sizes = _ladder(min_tokens, max_num_batched_tokens, 2)
        else:
            sizes = tuple(sorted(set(token_sizes)))
            if sizes[-1] != max_num_batched_tokens or sizes[0] < min_tokens:
                raise ConfigError(
                    f"token_buckets must reach from at least {min_tokens} to max_num_batched_tokens "
                    f"({max_num_batched_tokens}), got {list(token_sizes)}"
                )
        largest = min(max(max_num_seqs, min_tokens), sizes[-1])  # the head needs as many rows as the model tokens
        rows = (min(sizes[0], largest), *(size for size in _ladder(16, largest, 4) if size > sizes[0]))
        return cls(sizes, tuple(sorted(set(rows))))

    def pick(self, num_tokens: int) -> Bucket:
        """The smallest bucket that holds the step.

        >>> Buckets((2, 4, 8), (2, 4)).pick(5)
        Bucket(num_tokens=8, num_rows=4)
        """
        index = bisect_left(self.token_sizes, num_tokens)
        if index == len(self.token_sizes):
            raise ValueError(f"a step of {num_tokens} tokens exceeds the largest bucket, {self.token_sizes[-1]}")
        return self._bucket(self.token_sizes[index])

    def all(self) -> list[Bucket]:
        """Every bucket, largest first (it takes longest to compile and shows the peak of memory)."""
        return [self._bucket(size) for size in reversed(self.token_sizes)]

    def _bucket(self, num_tokens: int) -> Bucket:
        index = bisect_left(self.row_sizes, num_tokens)
        return Bucket(num_tokens, self.row_sizes[min(index, len(self.row_sizes) - 1)])


def _ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    """first, first * factor, ... below `last`, then `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)
