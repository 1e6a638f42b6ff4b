"""What jaxtyping puts around functions of the packages that carry shapes: beartype, where there is a shape to hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float, as in every type checker


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with arguments and answer checked at each call (while tracing, if it is jitted), if any has a shape.

    All other types are the static checker's: functions are tested with values that their annotations rule out, and JAX
    builds pytrees of any leaves.
    """
    return _check(function) if any(map(_has_shape, function.__annotations__.values())) else function


def _has_shape(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_shape, get_args(annotation)))
