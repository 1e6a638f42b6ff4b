"""A config.json made from a GGUF file's metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxserve.checkpoint_values import LARGEST, CheckpointValues
from jaxserve.errors import CheckpointError
from jaxserve.weights.gguf_header import GGUFHeader
from jaxserve.weights.gguf_names import ARCHITECTURES

_ORIGINAL = "original_max_position_embeddings"
_ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
_WINDOW = "attention.sliding_window"
_TOKEN_IDS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def hf_config_from_gguf(header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Write the metadata as config.json says it.

    `rope_factors`, f32[head_dim / 2], is the file's `rope_freqs.weight`: what each rotary frequency is divided by.
    """
    reader = _Metadata(header)
    heads = reader.size("num_attention_heads", "attention.head_count")
    hidden = reader.size("hidden_size", "embedding_length")
    rotated = reader.size("head_dim", "rope.dimension_count", default=max(1, hidden // heads))
    head_dim = reader.size("head_dim", "attention.key_length", default=rotated)
    theta = reader.number("rope.freq_base", default=10000.0, above=1)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[reader.architecture]],
        "model_type": reader.architecture,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": reader.size("intermediate_size", "feed_forward_length"),
        "num_hidden_layers": reader.size("num_hidden_layers", "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.size("num_key_value_heads", "attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.size("max_position_embeddings", "context_length"),
        "rms_norm_eps": _short(reader.number("attention.layer_norm_rms_epsilon", default=1e-6)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(reader, rope_factors, theta, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }
    if reader.has(_WINDOW):
        config["sliding_window"] = reader.size("sliding_window", _WINDOW)
    return config | token_ids_from_gguf(header)


def token_ids_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """Return the bos, eos and pad ids; eos is a list where end of turn and end of text differ."""
    values = CheckpointValues(header.metadata, str(header.path))
    ids: dict[str, Any] = {}
    for key, name in _TOKEN_IDS.items():
        for token_id in values.integers(f"tokenizer.ggml.{key}"):
            ids[name] = token_id
    eos = list(dict.fromkeys(token_id for key in _EOS_KEYS for token_id in values.integers(f"tokenizer.ggml.{key}")))
    if eos:
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    return ids


class _Metadata:
    """Reads what stands under the architecture's prefix, with an error that names what is missing or wrong."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self.architecture = str(header.metadata.get("general.architecture"))
        self._values = CheckpointValues(header.metadata, str(header.path))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{header.path} holds the architecture {self.architecture!r:.80}; "
                f"GGUF is supported for {', '.join(sorted(ARCHITECTURES))}"
            )
        if any(self._values.integers(self._key("expert_count"))):
            raise CheckpointError(f"{header.path} is a mixture of experts, which is not supported as GGUF")
        if "token_embd.weight" not in header.tensors:
            raise CheckpointError(f"{header.path} has no tensor 'token_embd.weight': it holds a vocabulary only")

    def has(self, name: str) -> bool:
        return self._key(name) in self._values.values

    def size(self, name: str, entry: str, *, default: int | None = None) -> int:
        """What config.json calls `name`; where it is given layer by layer it must be the same for all."""
        key = self._key(entry)
        value = self._values.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata {key!r}")
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                raise CheckpointError(f"{self.path}: {key!r} differs from layer to layer")
            value = value[0].item()
        return CheckpointValues({key: value}, self._values.file).positive_integer(key, at_most=LARGEST.get(name))

    def number(self, name: str, *, default: float, above: float = 0.0) -> float:
        return self._values.number(self._key(name), default=default, above=above)

    def text(self, name: str, *, default: str) -> str:
        return self._values.text(self._key(name), default=default)

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"


def _rope_scaling(reader: _Metadata, factors: np.ndarray | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = reader.text("rope.scaling.type", default="none")
    if factors is not None:
        return _llama3_scaling(reader, factors.astype(np.float64), theta, head_dim)
    if kind == "none":
        return None
    factor = reader.number("rope.scaling.factor", default=1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        if not reader.has(_ORIGINAL_CONTEXT):
            return scaling
        return scaling | {_ORIGINAL: reader.size(_ORIGINAL, _ORIGINAL_CONTEXT)}
    raise CheckpointError(f"{reader.path} scales its rotary embedding by {kind!r:.80}, which is not supported")


def _llama3_scaling(reader: _Metadata, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the llama3 parameters that give these factors.

    With x = original / wavelength, a frequency is divided by 1 where x > high, by `factor` where x < low, and in
    between 1 / divisor = smooth + (1 - smooth) / factor, smooth = (x - low) / (high - low): a line through the points
    in between, which gives low and high.
    """
    refusal = CheckpointError(f"{reader.path}: 'rope_freqs.weight' is no llama3 scaling, the only one supported")
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
        raise refusal
    original = reader.size(_ORIGINAL, _ORIGINAL_CONTEXT, default=8192)
    turns = original / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))  # f64[head_dim / 2]
    factor, low, high = float(factors.max()), 1.0, 4.0
    between = (factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4))
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[between], smooth, 1)
        low, high = round(-start / slope, 3), round((1 - start) / slope, 3)
    scaling = {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        _ORIGINAL: original,
    }
    if not np.allclose(_llama3_factors(turns, factor, low, high), factors, rtol=1e-3):
        raise refusal
    return scaling


def _llama3_factors(turns: np.ndarray, factor: float, low: float, high: float) -> np.ndarray:
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (smooth + (1 - smooth) / factor)


def _short(value: float) -> float:
    """Return the shortest decimal that is this float32: 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
