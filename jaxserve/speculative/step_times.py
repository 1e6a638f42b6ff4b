"""`StepTimes`: how long steps take by their padded size, measured as they go."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_WEIGHT = 0.3  # of a new measurement
_FADE = 0.998  # a step: what is not measured is believed to take less and less, so that no bad measurement stays


class StepTimes:
    """Two times a size: of steps without drafts, and with them, which nothing is planned beside."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)  # tokens, ascending
        self._times_s: dict[tuple[int, bool], float] = {}
        self._seen: set[tuple[int, bool]] = set()

    def size_of(self, num_tokens: int) -> int:
        """The padded size of a step."""
        return self.sizes[min(bisect_left(self.sizes, num_tokens), len(self.sizes) - 1)]

    def add(self, num_tokens: int, has_drafts: bool, duration_s: float) -> None:
        """A step was measured. The first of its kind, which touches its memory first, is passed over."""
        key = (self.size_of(num_tokens), has_drafts)
        if key not in self._seen:
            self._seen.add(key)
            return
        last_s = self._times_s.get(key, duration_s)
        self._times_s[key] = last_s + _WEIGHT * (min(duration_s, 2 * last_s) - last_s)

    def fade(self, *, has_drafts: bool) -> None:
        """Steps of this kind are not being measured, for the other kind was chosen."""
        for key in self._times_s:
            if key[1] == has_drafts:
                self._times_s[key] *= _FADE

    def plain(self, size: int) -> float | None:
        """Seconds of a step without drafts, where that has been measured."""
        return self._times_s.get((size, False))

    def drafted(self, size: int, at_least_s: float) -> float:
        """Seconds of a step with drafts: measured, or else the most that smaller ones take, so that it is tried."""
        known = self._times_s.get((size, True))
        if known is None:
            known = max((s for (other, _), s in self._times_s.items() if other < size), default=0.0)
        return max(known, at_least_s)
