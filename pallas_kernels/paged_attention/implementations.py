"""The implementations of paged attention, and which of them serves a model on a device."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, get_args

import jax

from pallas_kernels.dispatch import PREFERENCE, Implementation, check_runs_on
from pallas_kernels.paged_attention.geometry import AttentionGeometry


class PagedAttention(Protocol):
    """What a subpackage named for its implementation exports."""

    check_supported: Callable[[AttentionGeometry], None]  # NotImplementedError says what it cannot do
    plan_shapes: Callable[..., Any]  # ShapeDtypeStructs of a bucket's plan
    build_plan: Callable[..., Any]  # numpy arrays of these shapes; block tables as wide as the longest row, at least
    paged_attention: Callable[..., jax.Array]  # see op.py


def implementation_of(name: Implementation) -> PagedAttention:
    """The implementation, imported when first asked for: Mosaic takes long to import where it is not used."""
    if name not in get_args(Implementation):
        raise ValueError(f"paged_attention: unknown implementation {name!r}; use one of {get_args(Implementation)}")
    module: Any = importlib.import_module(f"pallas_kernels.paged_attention.{name}")
    return module


def choose_implementation(
    asked: Implementation | None, geometry: AttentionGeometry, *, device: Any
) -> tuple[Implementation, list[str]]:
    """The implementation for a model on a device (see `check_runs_on`), and why better ones were passed over.

    One that is asked for by name is taken or refused: NotImplementedError with its reason.
    """
    if asked is not None:
        _check(asked, geometry, device)
        return asked, []
    refusals = []
    for name in PREFERENCE.get(device.platform, ("xla",)):
        try:
            _check(name, geometry, device)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
        else:
            return name, refusals
    raise NotImplementedError("; ".join(refusals))


def _check(name: Implementation, geometry: AttentionGeometry, device: Any) -> None:
    check_runs_on(name, device)
    implementation_of(name).check_supported(geometry)
