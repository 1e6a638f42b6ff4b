"""How deeply objects and lists lie in one another, found without recursion: clients may send any depth."""

from __future__ import annotations

from typing import Any


def is_deeper_than(value: dict[str, Any] | list[Any], levels: int) -> bool:
    """Whether more than `levels` objects or lists lie in one another, `value` being the first.

    >>> is_deeper_than({"a": [1]}, 2), is_deeper_than({"a": [1]}, 1)
    (False, True)
    """
    level: list[Any] = [value]
    for _ in range(levels):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
