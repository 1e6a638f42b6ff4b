"""The implementations there are of each op, and which are tried on a device, in order."""

from collections.abc import Mapping
from typing import Literal

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "native_cpu", "xla"]

# The first that takes a model's sizes serves it. "xla" runs everywhere, so it ends every list.
PREFERENCE: Mapping[str, tuple[Implementation, ...]] = {
    "cuda": ("mosaic_gpu", "xla"),
    "gpu": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("native_cpu", "xla"),
}
