"""Chooses the implementation of an op: tries those that fit the platform, in order, until one takes the call."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "xla"]

# The first that does not raise NotImplementedError wins. "xla" runs everywhere, so it ends every list.
PREFERENCE: Mapping[str, tuple[Implementation, ...]] = {
    "cuda": ("mosaic_gpu", "xla"),
    "gpu": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("xla",),
}


def dispatch(
    op: str,
    kernels: Mapping[Implementation, Callable[..., Any]],
    implementation: Implementation | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls one of `kernels`.

    With an explicit `implementation` only that one is called. Otherwise a NotImplementedError means "right arguments,
    wrong kernel" and the next is tried; a ValueError means "wrong arguments" and always goes to the caller.
    """
    if implementation is not None:
        if implementation not in get_args(Implementation):
            raise ValueError(
                f"{op}: unknown implementation {implementation!r}; use one of {get_args(Implementation)} or None"
            )
        if implementation not in kernels:
            raise NotImplementedError(f"{op} has no {implementation!r} kernel; it has {sorted(kernels)}")
        return kernels[implementation](*args, **kwargs)
    refusals = []
    for name in PREFERENCE.get(jax.default_backend(), ("xla",)):
        if name not in kernels:
            continue
        try:
            return kernels[name](*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"{op}: no kernel takes this call ({'; '.join(refusals) or 'none is registered'})")
