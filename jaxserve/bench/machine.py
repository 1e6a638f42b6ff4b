"""What machine this is: facts that a measurement means nothing without."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

# Reported where they are installed.
_PACKAGES = ("jaxserve", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")


def describe_machine() -> dict[str, str | int | float]:
    """Date, system, processor and versions; starts no device."""
    facts: dict[str, str | int | float] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2),  # runnable processes, mean of the last minute
        "memory_gib": round(psutil.virtual_memory().total / 1024**3, 1),
    }
    for package in (*_PACKAGES, *_PLUGINS):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # not installed, so not part of this machine
    return facts


def describe_devices() -> list[str]:
    """JAX's devices, such as "cpu:0 cpu"; starts JAX."""
    import jax  # slow, and takes hold of the devices

    return [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
