"""A stage in a process of its own: `python -m tests.gpu.stage NAME SIZES`, started and listened to by `check`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.isolation import serve
from tests.gpu.plan import STAGES
from tests.gpu.sizes import SIZES


def main() -> None:
    """Serve the works that the parent names."""
    name, sizes = sys.argv[1:]
    module: Any = importlib.import_module(STAGES[name].module)
    serve(
        lambda names: module.prepare(SIZES[sizes], names), is_usable=lambda: not STAGES[name].is_peer and _is_usable()
    )


def _is_usable() -> bool:
    """Whether the device still answers: after an illegal access nothing in this process ever will."""
    try:
        return bool(jnp.ones(8).sum().item() == 8)
    except jax.errors.JaxRuntimeError:
        return False


if __name__ == "__main__":
    main()
