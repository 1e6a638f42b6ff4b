"""What lets XLA compile quickly what tests run for milliseconds; most of a test's time would be its compiler's."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

# The older emitters of XLA:CPU take a third of the time that the default ones take for a sampler. Later versions of JAX
# have no others, and have become quicker by themselves.
_OLDER_EMITTERS: dict[str, Any] = (
    {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}  # type: ignore[attr-defined]
)
OPTIONS: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1} | _OLDER_EMITTERS

# For processes that serve tiny models.
QUICK_COMPILES = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()),
}

_options: dict[str, Any] = {}  # of what this process compiles, by now


@contextmanager
def as_served(*, quick_llvm: bool = False) -> Iterator[None]:
    """What is compiled meanwhile is compiled as for users; but LLVM does not work on it, if so asked.

    Nothing compiled otherwise is used meanwhile, nor later what was compiled meanwhile.
    """
    _set_up(quick_llvm=quick_llvm, quick_fusions=False)
    jax.clear_caches()
    yield
    _set_up(quick_llvm=True, quick_fusions=True)
    jax.clear_caches()


def install() -> None:
    """From now on this process compiles quickly. JAX takes such options for a jitted function or a whole process."""
    compiler = importlib.import_module("jax._src.compiler")
    as_asked = compiler.get_compile_options

    def with_options(*arguments: Any, **named: Any) -> Any:
        options = as_asked(*arguments, **named)
        options.env_option_overrides = [*options.env_option_overrides, *_options.items()]
        return options

    compiler.get_compile_options = with_options
    _set_up(quick_llvm=True, quick_fusions=True)


def _set_up(*, quick_llvm: bool, quick_fusions: bool) -> None:
    jax.config.update("jax_disable_most_optimizations", quick_llvm)
    os.environ["JAX_TESTS_QUICK_FUSIONS"] = str(quick_fusions)  # so that kept programs of both kinds are told apart
    _options.clear()
    _options.update(OPTIONS if quick_fusions else {})
