"""From a launch config to a model: finds the checkpoint, reads its config, and streams its weights to the mesh."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from jaxserve.checkpoint_values import CheckpointValues
from jaxserve.config import ModelSettings
from jaxserve.errors import CheckpointError, ConfigError, InvalidRequestError
from jaxserve.models.base import DecoderConfig, WeightRule
from jaxserve.models.registry import family
from jaxserve.parallel.mesh import sharding, to_devices
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.sampling_params import SamplingParams
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.dummy import DummyCheckpoint
from jaxserve.weights.mapping import check_fits, load_params
from jaxserve.weights.safetensors_files import read_json
from jaxserve.weights.source import resolve_source

logger = logging.getLogger(__name__)

_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


_FORMATS = {"folder": "safetensors", "gguf": "gguf"}  # by the kind of the source
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """An opened checkpoint (None: random weights) with its config, overrides applied, and the dtype to run in."""

    checkpoint: Checkpoint | None
    hf_config: dict[str, Any]
    decoder: DecoderConfig
    dtype: np.dtype
    eos_token_ids: list[int]  # as generation_config.json names them, or else config.json
    default_sampling: dict[str, float | int]  # what the model's makers recommend, under our names
    seed: int

    def max_model_len(self, asked: int | None) -> int:
        """Positions a sequence may have: what was asked for, within what the model was made for."""
        limit = self.decoder.max_position_embeddings
        if asked is not None and asked > limit:
            raise ConfigError(
                f"max_model_len is {asked}, but the model's max_position_embeddings is {limit}; lower it, or override "
                "max_position_embeddings in hf_overrides"
            )
        return asked or limit


def open_model(config: ModelSettings) -> ModelFiles:
    """Find and open what `model` names; `dtype: auto` is what the checkpoint says, bfloat16 for GGUF."""
    source = resolve_source(config.model, revision=config.revision, tokenizer_only=config.load_format == "dummy")
    if config.load_format not in ("auto", "dummy", _FORMATS[source.kind]):
        raise ConfigError(
            f"load_format is {config.load_format!r}, but model {config.model!r} is {_FORMATS[source.kind]}; leave "
            "load_format out, or give a .gguf file for 'gguf' and a folder or hub id for 'safetensors'"
        )
    checkpoint, generation_config = None, {}
    if config.load_format == "dummy" and source.kind == "folder":
        hf_config = read_json(source.path / "config.json")
    else:
        asked = _DTYPES.get(config.dtype, np.dtype(ml_dtypes.bfloat16))
        opened = open_checkpoint(source, dtype=asked)
        hf_config = opened.hf_config()
        checkpoint = None if config.load_format == "dummy" else opened
        generation_config = opened.generation_config()
    files = describe_model(config, hf_config, platform=jax.default_backend())
    if checkpoint is not None:
        _check_tensors(checkpoint, files.decoder)
    generation = CheckpointValues(generation_config, "generation_config.json")
    named_eos_ids = generation.integers("eos_token_id") or files.eos_token_ids
    eos_token_ids = [token_id for token_id in named_eos_ids if token_id < files.decoder.vocab_size]
    if len(eos_token_ids) < len(named_eos_ids):
        logger.warning(
            "%s: eos_token_id %s is not all in the vocabulary of %d; what is beyond is left out",
            *(source.path, named_eos_ids, files.decoder.vocab_size),
        )
    return replace(
        files,
        checkpoint=checkpoint,
        eos_token_ids=eos_token_ids,
        default_sampling=_recommended_sampling(generation) if config.generation_config == "auto" else {},
    )


def describe_model(config: ModelSettings, hf_config: dict[str, Any], *, platform: str) -> ModelFiles:
    """A model by its config.json alone, `config`'s overrides applied, as it would run on a platform."""
    hf_config = _merge(hf_config, config.hf_overrides)
    if "draft_vocab_size" in hf_config:
        raise ConfigError(
            f"model {config.model!r} is a draft head (draft_vocab_size); give the method 'eagle3' with it in "
            "speculative_config, beside the model that it was made for"
        )
    return ModelFiles(
        checkpoint=None,
        hf_config=hf_config,
        decoder=DecoderConfig.from_hf(hf_config),
        dtype=_dtype(config, hf_config, platform),
        eos_token_ids=CheckpointValues(hf_config).integers("eos_token_id"),
        default_sampling={},
        seed=config.seed,
    )


def _check_tensors(checkpoint: Checkpoint, decoder: DecoderConfig) -> None:
    """Hold a config against the tensors before anything is built by it: a wrong number costs no time and no memory."""
    model = family(decoder.architecture)
    check_fits(
        checkpoint,
        model.weight_rules(decoder),
        ignored=model.unused_tensors,
        tie_embeddings=decoder.tie_embeddings,
    )


def _recommended_sampling(generation: CheckpointValues) -> dict[str, float | int]:
    given = generation.given().values
    sampling = {name: given[name] for name in _SAMPLING_DEFAULTS if name in given}
    try:
        SamplingParams(**sampling).validate()
    except InvalidRequestError as error:
        raise CheckpointError(
            f"{generation.file}: {error}; correct it, or leave its sampling defaults out with --generation-config vllm"
        ) from error
    return sampling


def load_weights(files: ModelFiles, graph: ModelGraph, on_progress: Callable[[str, int, int], None]) -> Params:
    """Every parameter on its devices, streamed tensor by tensor; rows that only other hosts hold are not read."""
    rules = graph.weight_rules()
    checkpoint = files.checkpoint
    if checkpoint is None:
        shapes = {name: shape for rule in rules for name, shape in zip(rule.sources, rule.shapes, strict=True)}
        checkpoint = DummyCheckpoint(files.hf_config, shapes, dtype=files.dtype, seed=files.seed)

    shapes = {rule.param: rule.param_shape for rule in rules}
    parts = {rule.param: _rows_of_this_host(rule, sharding(graph.mesh, graph.axes(rule.param))) for rule in rules}

    def put(name: str, value: np.ndarray) -> jax.Array:
        where, rows = sharding(graph.mesh, graph.axes(name)), parts[name][1]
        return to_devices(graph.laid_out(name, value), where, shape=shapes[name], first_row=rows.start)

    return load_params(
        checkpoint,
        [rule for rule, _ in parts.values()],
        dtype=files.dtype,
        place=put,
        ignored=graph.unused_tensors(),
        tie_embeddings=files.decoder.tie_embeddings,  # as hf_overrides have it
        on_progress=on_progress,
    )


def _rows_of_this_host(rule: WeightRule, where: Sharding) -> tuple[WeightRule, range]:
    """The rule for what this host's devices hold of a parameter's first axis, and which rows those are."""
    size = rule.param_shape[0]
    indices = where.addressable_devices_indices_map(rule.param_shape).values()
    slices = [index[0].indices(size) for index in indices if index]
    rows = range(min(start for start, _, _ in slices), max(stop for _, stop, _ in slices))
    part = None if rule.part is None or len(rows) == size else rule.part(rows)
    return (rule, range(size)) if part is None else (part, rows)


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


def _dtype(config: ModelSettings, hf_config: dict[str, Any], platform: str) -> np.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    stored = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if stored == "float16" and platform == "cpu":
        logger.info("float16 weights run as float32: products of float16 take up to 17 times as long on CPU")
        return _DTYPES["float32"]
    return _DTYPES.get(stored, _DTYPES["bfloat16"])
