"""`Program`: a function of a step with all that it is compiled for, so that its results' tree is known untraced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Lowered


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What `jax.jit` is told of a function; nothing is traced before `lower`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # trees of abstract arrays
    results: Any  # their shardings, in the very tree that the function gives back
    donated: tuple[int, ...] = ()  # which of the arguments

    def lower(self) -> Lowered:
        """Trace and lower it."""
        jitted = jax.jit(self.function, donate_argnums=self.donated, out_shardings=self.results)
        return jitted.lower(*self.arguments)

    @property
    def arguments_tree(self) -> Any:
        """The tree of positional arguments, and of no others."""
        return jax.tree.structure((self.arguments, {}))

    @property
    def results_tree(self) -> Any:
        """The tree of the results."""
        return jax.tree.structure(self.results)
