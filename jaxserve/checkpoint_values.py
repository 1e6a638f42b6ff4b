"""`CheckpointValues`: what the JSON files of a checkpoint say, read by type; a wrong value is named in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxserve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class CheckpointValues:
    """A JSON object of `file`. Every reading raises `CheckpointError` for a value of another type."""

    values: Mapping[str, Any]
    file: str = "config.json"

    def given(self) -> Self:
        """The same without what is null: for entries that transformers writes as null where they follow from others."""
        return type(self)({name: value for name, value in self.values.items() if value is not None}, self.file)

    def positive_integer(self, name: str, *, default: int | None = None) -> int:
        """The integer called `name`, at least 1; without a default it must be there."""
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a positive integer")
        return value

    def number(self, name: str, *, default: float | None = None, above: float = 0.0) -> float:
        """The finite number called `name`, greater than `above`; without a default it must be there."""
        value = self.values.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < math.inf:
            raise self.wrong(name, "a positive number" if above == 0 else f"a number above {above:g}")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """The truth of `name`; null is false."""
        value = self.values.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str, *, default: str) -> str:
        """The text called `name`."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        return value

    def texts(self, name: str) -> list[str]:
        """The list of texts called `name`; none without one, or where it is null."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of texts")
        return value

    def within(self, name: str) -> CheckpointValues:
        """The object called `name`; empty without one, or where it is null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "a JSON object")
        return CheckpointValues(value or {}, self.file)

    def integers(self, name: str) -> list[int]:
        """The list called `name`, of integers from 0 up, or the one that stands alone; none without, or where null."""
        value = self.values.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.wrong(name, "an integer from 0 up, or a list of such")
        return items

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The error for a value that is not what is `wanted`."""
        return CheckpointError(f"{self.file}: {name!r} must be {wanted}, got {self.values.get(name)!r:.80}")
