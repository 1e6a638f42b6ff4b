"""Rotary position embedding (Su et al. 2021) with the frequency scalings that Llama-family checkpoints name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.checkpoint_values import CheckpointValues
from jaxserve.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Base, rotated width and scaling of the rotary embedding, from any spelling of `config.json`."""

    theta: float
    head_dim: int
    rope_type: str = "default"
    scaling: CheckpointValues = CheckpointValues({})
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        values = CheckpointValues(config).given()
        spelling = "rope_parameters" if values.within("rope_parameters").values else "rope_scaling"
        parameters = values.within(spelling).given()
        if any(isinstance(value, Mapping) for value in parameters.values.values()):
            raise CheckpointError("config.json: rope_parameters that differ by layer type are not supported")
        partial = parameters.values.get("partial_rotary_factor", values.values.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise CheckpointError(f"config.json: partial_rotary_factor {partial} is not supported, only 1")
        rope_type = parameters.text("rope_type", default=parameters.text("type", default="default"))
        if rope_type not in _INVERSE_FREQUENCIES:
            known = ", ".join(sorted(_INVERSE_FREQUENCIES))
            raise CheckpointError(f"config.json: rope type {rope_type!r} is not supported; known are {known}")
        rope = cls(
            theta=parameters.number(
                "rope_theta", default=values.number("rope_theta", default=10000.0, above=1), above=1
            ),
            head_dim=head_dim,
            rope_type=rope_type,
            scaling=parameters,
            max_position_embeddings=values.positive_integer("max_position_embeddings", default=2048),
        )
        rope.inverse_frequencies()  # reads what the rope type needs, so that a wrong value is known now
        return rope

    def scaling_value(self, name: str) -> float:
        """A positive number that the rope type needs; `CheckpointError` if `config.json` lacks it."""
        if name not in self.scaling.values:
            raise CheckpointError(f"config.json: rope type {self.rope_type!r} needs {name!r} in rope_parameters")
        return self.scaling.number(name)

    def inverse_frequencies(self) -> tuple[np.ndarray, float]:
        """(f32[head_dim / 2], factor that cos and sin are multiplied by)."""
        return _INVERSE_FREQUENCIES[self.rope_type](self)


def _default(rope: RopeConfig) -> tuple[np.ndarray, float]:
    exponents = np.arange(0, rope.head_dim, 2, dtype=np.float32) / np.float32(rope.head_dim)
    return (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32), 1.0


def _linear(rope: RopeConfig) -> tuple[np.ndarray, float]:
    frequencies, factor = _default(rope)
    return frequencies / np.float32(rope.scaling_value("factor")), factor


def _llama3(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    frequencies, scale = _default(rope)
    factor = rope.scaling_value("factor")
    low, high = rope.scaling_value("low_freq_factor"), rope.scaling_value("high_freq_factor")
    original = rope.scaling_value("original_max_position_embeddings")
    wavelengths = 2 * np.pi / frequencies
    if not low < high:
        raise CheckpointError(f"config.json: low_freq_factor ({low:g}) must be less than high_freq_factor ({high:g})")
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(is_between, blended, scaled).astype(np.float32), scale


def _yarn(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, ramp between, and scale attention."""
    scaling = rope.scaling
    factor = rope.scaling_value("factor")
    original = scaling.number("original_max_position_embeddings", default=rope.max_position_embeddings)
    beta_fast, beta_slow = scaling.number("beta_fast", default=32), scaling.number("beta_slow", default=1)

    def dimension(rotations: float) -> float:
        return rope.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if scaling.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    ramp = np.clip((np.arange(rope.head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    frequencies, _ = _default(rope)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return blended.astype(np.float32), _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: CheckpointValues, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in scaling.values:
        return scaling.number("attention_factor")
    if scaling.values.get("mscale", 0) != 0 and scaling.values.get("mscale_all_dim", 0) != 0:  # 0 is as good as none
        return scale(scaling.number("mscale")) / scale(scaling.number("mscale_all_dim"))
    return scale(1.0)


_INVERSE_FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}

Rotation = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]  # cos, sin


def rotation(rope: RopeConfig, positions: Int[Array, " tokens"]) -> Rotation:
    """cos and sin of every position's angles, float32; computed once a step for all layers."""
    frequencies, factor = rope.inverse_frequencies()
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
