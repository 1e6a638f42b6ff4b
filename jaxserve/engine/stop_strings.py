"""`StopMatcher`: finds stop strings in text that arrives in pieces, and says how much of its end must wait."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string found; `start` and `end` are offsets into the whole text."""

    stop: str
    start: int
    end: int


class StopMatcher:
    """One text's search for the stop string that is complete first; of several, the longest.

    Knuth-Morris-Pratt for each stop string: the work a character is bounded whatever the strings are, and the state
    (how many of a string's characters the text ends with) is just what must be held back.

    >>> matcher = StopMatcher(["<|end|>"])
    >>> matcher.feed("so <|e"), matcher.num_held_back
    (None, 3)
    >>> matcher.feed("nd|> more")
    StopMatch(stop='<|end|>', start=3, end=10)
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # characters of each stop string that the text now ends with
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._num_chars = 0

    @property
    def num_held_back(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        return max(self._lengths)

    def feed(self, text: str, *, can_match: bool = True) -> StopMatch | None:
        """Search the next piece; with `can_match` False a stop string that ends in it is passed over."""
        if not any(self._lengths) and self._first_characters.isdisjoint(text):
            self._num_chars += len(text)
            return None
        for character in text:
            self._num_chars += 1
            match = self._advance(character)
            if match is not None and can_match:
                return match
        return None

    def _advance(self, character: str) -> StopMatch | None:
        match = None
        for i, stop in enumerate(self._stops):
            length, borders = self._lengths[i], self._borders[i]
            while length and stop[length] != character:
                length = borders[length - 1]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                match = match or StopMatch(stop, self._num_chars - length, self._num_chars)
                length = borders[-1]
            self._lengths[i] = length
        return match


@lru_cache(maxsize=1024)  # a request's n sequences have the same strings, and so have most requests
def _borders(text: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper prefix that is also its suffix.

    >>> _borders("abab")
    (0, 0, 1, 2)
    """
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return tuple(borders)
