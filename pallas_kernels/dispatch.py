"""The implementations there are of each op, and which are tried on a device, in order."""

from collections.abc import Mapping
from typing import Any, Literal

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "native_cpu", "xla"]

# The first that takes a model's sizes serves it. "xla" runs everywhere, so it ends every list.
PREFERENCE: Mapping[str, tuple[Implementation, ...]] = {
    "cuda": ("mosaic_gpu", "xla"),
    "gpu": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("native_cpu", "xla"),
}


def check_runs_on(implementation: Implementation, device: Any) -> None:
    """NotImplementedError, with the reason, for a device whose compiler would refuse the implementation's kernels.

    `device` is one of JAX's, here or of a topology, or an `AbstractDevice` that has a `compute_capability`, as GPUs do.
    """
    preferred = PREFERENCE.get(device.platform, ("xla",))
    if implementation not in preferred:
        raise NotImplementedError(
            f"{implementation!r} does not run on {device.platform}; here are {', '.join(preferred)}"
        )
    if implementation == "mosaic_gpu":
        capability = getattr(device, "compute_capability", "an unknown one")  # "9.0"; "gfx942" of one that is AMD's
        if not capability.startswith("9."):
            raise NotImplementedError(
                f"mosaic_gpu runs on Hopper GPUs alone (compute capability 9.x: no other has wgmma), and "
                f"{device.device_kind} has {capability}"
            )
