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
    """The token buckets in ascending order, each with its row bucket min(tokens, max_num_seqs)."""

    token_sizes: tuple[int, ...]
    max_num_seqs: int

    @classmethod
    def plan(
        cls,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        min_tokens: int = 1,
        token_sizes: Sequence[int] | None = None,
    ) -> Buckets:
        """Powers of two from `min_tokens` up to the token budget, or the sizes a user gave.

        >>> Buckets.plan(max_num_batched_tokens=100, max_num_seqs=8, min_tokens=2).token_sizes
        (2, 4, 8, 16, 32, 64, 100)
        """
        if token_sizes is None:
            sizes = []
            size = min_tokens
            while size < max_num_batched_tokens:
                sizes.append(size)
                size *= 2
            return cls((*sizes, max_num_batched_tokens), max_num_seqs)
        sizes = sorted(set(token_sizes))
        if sizes[-1] != max_num_batched_tokens or sizes[0] < min_tokens:
            raise ConfigError(
                f"token_buckets must reach from at least {min_tokens} to max_num_batched_tokens "
                f"({max_num_batched_tokens}), got {list(token_sizes)}"
            )
        return cls(tuple(sizes), max_num_seqs)

    def pick(self, num_tokens: int) -> Bucket:
        """The smallest bucket that holds the step.

        >>> Buckets((2, 4, 8), max_num_seqs=4).pick(5)
        Bucket(num_tokens=8, num_rows=4)
        """
        index = bisect_left(self.token_sizes, num_tokens)
        if index == len(self.token_sizes):
            raise ValueError(f"a step of {num_tokens} tokens exceeds the largest bucket, {self.token_sizes[-1]}")
        return self._bucket(self.token_sizes[index])

    def all(self) -> list[Bucket]:
        """Every bucket, largest first (it takes longest to compile and shows the peak of memory)."""
        return [self._bucket(size) for size in reversed(self.token_sizes)]

    def row_sizes(self) -> list[int]:
        """The distinct numbers of rows, largest first."""
        return sorted({bucket.num_rows for bucket in self.all()}, reverse=True)

    def _bucket(self, num_tokens: int) -> Bucket:
        return Bucket(num_tokens, min(num_tokens, self.max_num_seqs))
