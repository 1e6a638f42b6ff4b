"""Which device the engine runs on: holds JAX to the platform asked for, and knows its defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import jax

from jaxserve.config import Config
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDefaults:
    """Settings that depend on the kind of device, where the launch config leaves them open."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(cls, platform: str) -> DeviceDefaults:
        """For "cpu", "gpu" or "tpu". Two CPU cores gain nothing from steps of more than 512 tokens."""
        if platform == "cpu":
            return cls(block_size=16, max_num_seqs=64, max_num_batched_tokens=512)
        return cls(block_size=16 if platform == "gpu" else 128, max_num_seqs=256, max_num_batched_tokens=8192)


def choose_device(config: Config) -> None:
    """Hold JAX to the platform asked for; a missing one is an error, never a slower one in silence."""
    device = config.runtime.device
    if device != "auto":
        jax.config.update("jax_platforms", device)
    try:
        platform = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a CUDA plugin is not installed
        reason = next(iter(str(error).splitlines()), "JAX finds no such plugin")
        raise ConfigError(
            f"device {device!r} is not available: {reason}; install jaxserve with its extra (cuda12, cuda13, tpu), or "
            "choose --device cpu"
        ) from error
    if device != "auto" and platform != {"cuda": "gpu"}.get(device, device):
        raise ConfigError(
            f"device is {device!r}, but JAX already runs on {platform!r} in this process; set the device before JAX is "
            "first used"
        )
    logger.info("JAX %s on %s: %s", jax.__version__, platform, jax.devices()[0].device_kind)
