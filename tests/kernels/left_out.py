"""Leaves out, one after the other, what a kernel waits for, and sees whether its interpreter misses it."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax


class Wait(NamedTuple):
    """A place where a kernel waits, or fences its stores off from what follows; in a loop over K and V, for both."""

    name: str
    path: tuple[tuple[str, int], ...]  # functions of pallas_kernels and lines in them, from the innermost

    def __str__(self) -> str:
        return f"{self.name} in {self.path[0][0].split('.<locals>')[0]}"


class Waits:
    """Those of the kernels that are traced meanwhile."""

    def __init__(self, left_out: Wait | None) -> None:
        self.left_out = left_out
        self.met: dict[Wait, None] = {}  # in the order of tracing, which passes some places several times

    def watched(self, name: str, wait: Callable[..., None]) -> Callable[..., None]:
        """`wait`, to be called in its place."""

        def call(*args: Any, **options: Any) -> None:
            here = Wait(name, tuple(_path()))
            self.met[here] = None
            if here != self.left_out:
                wait(*args, **options)

        return call


def _path() -> list[tuple[str, int]]:
    path, frame = [], sys._getframe(2)
    while frame is not None:
        if "pallas_kernels" in frame.f_code.co_filename:
            path.append((frame.f_code.co_qualname, frame.f_lineno))
        frame = frame.f_back
    return path


def not_missed(fails: Callable[[], bool], watch: Callable[[Waits], AbstractContextManager[object]]) -> Counter[str]:
    """Waits without which `fails` is still False, which runs a kernel; `watch` has them watched while it does."""

    def run(left_out: Wait | None) -> tuple[bool, list[Wait]]:
        waits = Waits(left_out)
        jax.clear_caches()
        with watch(waits):
            failed = fails()
        jax.clear_caches()
        return failed, list(waits.met)

    failed, met = run(None)
    assert met and not failed
    return Counter(str(wait) for wait in met if not run(wait)[0])
