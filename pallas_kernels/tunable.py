"""What an op offers to autotune: its problems, their candidate tiles, and how one is measured."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class WrongResultError(Exception):
    """A candidate compiled, ran, and gave something else than the oracle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sizes that tiles are chosen for."""

    name: str
    sizes: Mapping[str, int | str]  # as the op's tiles.py looks them up
    candidates: Sequence[Mapping[str, int]]  # by name of their field; the heuristic tiles first
    measure: Callable[[Mapping[str, int]], dict[str, float]]  # microseconds by case; raises what goes wrong


def candidates(
    heuristic: Mapping[str, int], check: Callable[..., Any], axes: Mapping[str, Iterable[int]]
) -> list[Mapping[str, int]]:
    """The heuristic tiles, then all others of the axes' product that `check` takes (it raises ValueError).

    >>> candidates({"tokens": 4}, lambda tokens: None, {"tokens": (2, 4, 8)})
    [{'tokens': 4}, {'tokens': 2}, {'tokens': 8}]
    """
    found = [dict(heuristic)]
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        try:
            check(**fields)
        except ValueError:
            continue
        if fields not in found:
            found.append(fields)
    return list(found)
