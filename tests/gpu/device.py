"""Which device and which versions a run's figures are of."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

from pallas_kernels.compat import cuda_runtime_version, device_kind, num_multiprocessors
from tests.gpu.sizes import Sizes

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy"),
    *("torch", "triton", "transformers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)


def works(sizes: Sizes) -> list[str]:
    """One."""
    return ["device"]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """RuntimeError where the device is not the one that the sizes are for."""
    return lambda name: _describe(sizes)


def _describe(sizes: Sizes) -> dict[str, Any]:
    platform = jax.default_backend()
    if platform != {"cuda": "gpu"}.get(sizes.device, sizes.device):
        raise RuntimeError(
            f"JAX runs on {platform!r} here, the sizes {sizes.name!r} are for {sizes.device!r}; --toy checks the "
            "command itself on a CPU"
        )
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "kind": device_kind(),
        "platform": platform,
        "multiprocessors": num_multiprocessors(),
        "memory_bytes": stats.get("bytes_limit"),  # what JAX's allocator may take
        "cuda_runtime": cuda_runtime_version(),
        "cpu_cores": os.cpu_count(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
