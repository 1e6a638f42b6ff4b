"""`CheckpointValues`: what a checkpoint says beside its tensors, read by type; a wrong value is named in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxserve.errors import CheckpointError

# The most that a size may be, under its name in config.json: over ten times what the largest open models have (in
# brackets), so that only a damaged or mistyped file goes beyond, while all that is within can be described at once.
LARGEST = {
    "vocab_size": 1 << 22,  # (Gemma 3: 262,208)
    "hidden_size": 1 << 18,  # (Llama 3.1 405B: 16,384)
    "intermediate_size": 1 << 20,  # (Llama 3.1 405B: 53,248)
    "num_hidden_layers": 1 << 11,  # (Llama 3.1 405B: 126)
    "num_attention_heads": 1 << 11,  # (Llama 3.1 405B: 128)
    "num_key_value_heads": 1 << 11,
    "head_dim": 1 << 13,  # (Gemma 3: 256)
    "max_position_embeddings": 1 << 27,  # (Llama 4 Scout: 10,485,760)
}
_INT32 = 2**31 - 1  # the limit of all other integers: tokens and positions are int32 on the device
_FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # smallest normal and largest: what the device computes with


@dataclass(frozen=True, slots=True)
class CheckpointValues:
    """A JSON object of `file`, or a GGUF file's metadata.

    Every reading raises `CheckpointError` for a value of another type.
    """

    values: Mapping[str, Any]
    file: str = "config.json"

    def given(self) -> Self:
        """The same without what is null: for entries that transformers writes as null where they follow from others."""
        return type(self)({name: value for name, value in self.values.items() if value is not None}, self.file)

    def positive_integer(self, name: str, *, default: int | None = None, at_most: int | None = None) -> int:
        """The integer called `name`, from 1 to `at_most` (None: what `LARGEST` says); without a default it must be
        there."""
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a positive integer")
        most = at_most or LARGEST.get(name, _INT32)
        if value > most:
            raise self.wrong(name, f"at most {most}")
        return value

    def number(self, name: str, *, default: float | None = None, above: float = 0.0) -> float:
        """The number called `name`, greater than `above` and within float32; without a default it must be there."""
        value = self.values.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value:
            raise self.wrong(name, "a positive number" if above == 0 else f"a number above {above:g}")
        smallest, largest = _FLOAT32
        if not smallest <= value <= largest:
            raise self.wrong(name, f"a number that float32 holds, {smallest:.2g} to {largest:.2g}")
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
        """The list called `name`, of integers of int32 from 0 up, or the one that stands alone; none without, or where
        null."""
        value = self.values.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _INT32 for item in items):
            raise self.wrong(name, f"an integer from 0 to {_INT32}, or a list of such")
        return items

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The error for a value that is not what is `wanted`."""
        return CheckpointError(f"{self.file}: {name!r} must be {wanted}, got {self.values.get(name)!r:.80}")
