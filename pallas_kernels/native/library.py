"""The compiled library in this process: loaded once, its functions known to XLA as custom calls."""

import ctypes
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.native.build import UnavailableError, build, source_digest

FUNCTIONS = ("matmul", "paged_attention", "rotate_and_write")


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles the library where needed, and makes its functions known to XLA; `UnavailableError` if it cannot."""
    path = build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} does not load: {error}; delete it to have it compiled again") from error
    for name in FUNCTIONS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxserve_{name}"))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    return library


@functools.cache
def has_tiles() -> bool:
    """Whether this processor has matrix tiles (AMX) for bfloat16, and the system lets this process use them."""
    return bool(load().jaxserve_has_tiles())


def panel_columns(dtype: jax.typing.DTypeLike) -> int:
    """How many rows of weights of this dtype make a panel on this processor; 0: `matmul` does not take them so."""
    dtype = jnp.dtype(dtype)
    return load().jaxserve_panel_columns(dtype.itemsize) if dtype in (jnp.float32, jnp.bfloat16) else 0


def call(name: str, results: Any, *args: jax.Array, aliases: dict[int, int] | None = None, **settings: Any) -> Any:
    """Calls one of `FUNCTIONS` inside a traced computation; `aliases`: which argument each result lies in."""
    load()
    return jax.ffi.ffi_call(_target(name), results, input_output_aliases=aliases)(*args, **settings)


@functools.cache
def _target(name: str) -> str:
    return f"jaxserve_{name}_{source_digest()}"
