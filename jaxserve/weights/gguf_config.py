"""A config.json made from a GGUF file's metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.weights.gguf_header import GGUFHeader
from jaxserve.weights.gguf_names import ARCHITECTURES

_TOKEN_IDS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def hf_config_from_gguf(header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Write the metadata as config.json says it.

    `rope_factors`, f32[head_dim / 2], is the file's `rope_freqs.weight`: what each rotary frequency is divided by.
    """
    reader = _Metadata(header)
    heads, hidden = reader.integer("attention.head_count"), reader.integer("embedding_length")
    head_dim = reader.integer("attention.key_length", reader.integer("rope.dimension_count", hidden // heads))
    theta = float(reader.get("rope.freq_base", 10000.0))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[reader.architecture]],
        "model_type": reader.architecture,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("context_length"),
        "rms_norm_eps": _short(reader.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(reader, rope_factors, theta, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }
    window = reader.get("attention.sliding_window", None)
    if window is not None:
        config["sliding_window"] = int(window)
    return config | token_ids_from_gguf(header)


def token_ids_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """Return the bos, eos and pad ids; eos is a list where end of turn and end of text differ."""
    metadata = header.metadata
    ids: dict[str, Any] = {}
    for key, name in _TOKEN_IDS.items():
        if (value := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            ids[name] = int(value)
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in _EOS_KEYS]
    eos = list(dict.fromkeys(int(value) for value in found if value is not None))
    if eos:
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    return ids


class _Metadata:
    """Looks keys up under the architecture's prefix, with an error that names what is missing."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.architecture = str(header.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{header.path} holds the architecture {self.architecture!r}; "
                f"GGUF is supported for {', '.join(sorted(ARCHITECTURES))}"
            )
        if self.get("expert_count", 0):
            raise CheckpointError(f"{header.path} is a mixture of experts, which is not supported as GGUF")
        if "token_embd.weight" not in header.tensors:
            raise CheckpointError(f"{header.path} has no tensor 'token_embd.weight': it holds a vocabulary only")

    def get(self, key: str, default: Any) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.header.path} lacks the metadata '{self.architecture}.{key}'")
        if np.ndim(value):
            values = {int(item) for item in value}
            if len(values) != 1:
                raise CheckpointError(f"{self.header.path}: '{self.architecture}.{key}' differs from layer to layer")
            return values.pop()
        return int(value)


def _rope_scaling(reader: _Metadata, factors: np.ndarray | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = reader.get("rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(reader, factors.astype(np.float64), theta, head_dim)
    if kind == "none":
        return None
    factor = float(reader.get("rope.scaling.factor", 1.0))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        original = reader.get("rope.scaling.original_context_length", None)
        return scaling if original is None else scaling | {"original_max_position_embeddings": int(original)}
    raise CheckpointError(f"{reader.header.path} scales its rotary embedding by {kind!r}, which is not supported")


def _llama3_scaling(reader: _Metadata, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the llama3 parameters that give these factors.

    With x = original / wavelength, a frequency is divided by 1 where x > high, by `factor` where x < low, and in
    between 1 / divisor = smooth + (1 - smooth) / factor, smooth = (x - low) / (high - low): a line through the points
    in between, which gives low and high.
    """
    original = int(reader.get("rope.scaling.original_context_length", 8192))
    turns = original / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))  # f64[head_dim / 2]
    factor, low, high = float(factors.max()), 1.0, 4.0
    between = (factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4))
    if factors.shape == turns.shape and between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[between], smooth, 1)
        low, high = round(-start / slope, 3), round((1 - start) / slope, 3)
    scaling = {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    if factors.shape != turns.shape or not np.allclose(_llama3_factors(turns, factor, low, high), factors, rtol=1e-3):
        raise CheckpointError(f"{reader.header.path}: 'rope_freqs.weight' is no llama3 scaling, the only one supported")
    return scaling


def _llama3_factors(turns: np.ndarray, factor: float, low: float, high: float) -> np.ndarray:
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (smooth + (1 - smooth) / factor)


def _short(value: float) -> float:
    """Return the shortest decimal that is this float32: 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
