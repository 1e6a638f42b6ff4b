"""Which device the engine runs on: holds JAX to the platform asked for and to its share of a GPU's memory."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import jax
from jax._src import xla_bridge  # `backends_are_initialized` has no public name

from jaxserve.config import Config
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"  # part of a GPU's memory for JAX's allocator; read once, at its start
OLD_MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
JAX_MEMORY_FRACTION = 0.75  # where neither is set


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


def choose_device(config: Config) -> float:
    """Hold JAX to the platform asked for; a missing one is an error, never a slower one in silence.

    Returns which part of a device's own limit (`bytes_limit` of its statistics) this engine may take.
    """
    device = config.runtime.device
    if device != "auto":
        jax.config.update("jax_platforms", device)
    gpu_share = _bound_gpu_memory(config.cache.gpu_memory_utilization) if device in ("auto", "cuda") else 1.0
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
    return gpu_share if platform == "gpu" else config.cache.gpu_memory_utilization


def _bound_gpu_memory(utilization: float) -> float:
    """Give JAX's allocator `utilization` of a GPU's memory, unless that is settled; returns the engine's part of it.

    JAX takes all of it at the start (XLA_PYTHON_CLIENT_PREALLOCATE), which keeps it in one piece.
    """
    given = os.environ.get(MEMORY_FRACTION) or os.environ.get(OLD_MEMORY_FRACTION)
    if given:
        fraction = _parse_fraction(given)
    elif xla_bridge.backends_are_initialized():
        fraction = JAX_MEMORY_FRACTION
    else:
        fraction = utilization
        os.environ[MEMORY_FRACTION] = str(utilization)
    if fraction != utilization:
        logger.info(
            "JAX's allocator has %g of a GPU's memory, as %s or an earlier use of JAX in this process decided; "
            "gpu_memory_utilization is %g: the smaller one holds",
            *(fraction, MEMORY_FRACTION, utilization),
        )
    return min(1.0, utilization / fraction)


def _parse_fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not fraction > 0:
        raise ConfigError(f"{MEMORY_FRACTION} must be a number above 0, got {text!r}; unset it, or set one in (0, 1]")
    return fraction
