"""The one place that hides differences between JAX versions."""

from typing import TypeVar

import jax

T = TypeVar("T")


def register_pytree_dataclass(cls: type[T], data_fields: tuple[str, ...]) -> type[T]:
    """Registers a frozen dataclass whose fields are all arrays.

    Every supported version takes explicit field lists; only the newer ones can find the fields by themselves.
    """
    return jax.tree_util.register_dataclass(cls, data_fields=list(data_fields), meta_fields=[])
