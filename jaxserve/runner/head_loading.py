"""From `speculative_config` to a draft head: finds its checkpoint, reads its config, checks that it fits the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxserve.config_speculative import SpeculativeConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.base import DecoderConfig, positive_integer
from jaxserve.models.head import DraftHead, HeadConfig
from jaxserve.models.registry import HEADS
from jaxserve.runner.loading import ModelFiles
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.safetensors_files import read_json
from jaxserve.weights.source import resolve_source

logger = logging.getLogger(__name__)

_NUM_FEATURE_LAYERS = 3  # of EAGLE-3


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """An opened head."""

    files: ModelFiles
    config: HeadConfig
    family: type[DraftHead]
    feature_layers: tuple[int, ...]  # the model's, whose inputs it reads; none: it reads the final hidden states

    def complete(self, params: Params, model: ModelGraph, model_params: Params) -> Params:
        """Its parameters with those that it shares with the model."""
        (model_head,) = model.head_names()
        shared = self.config.parameters_of_model(model_head)
        return params | {name: model_params[theirs] for name, theirs in shared.items()}


def open_head(speculative: SpeculativeConfig, target: ModelFiles, *, is_dummy: bool, max_model_len: int) -> HeadFiles:
    """The head that a config names; `ConfigError` or `CheckpointError` says what is wrong with it."""
    name = f"draft head {speculative.model!r}" if speculative.model else "the model's own draft head"
    checkpoint, hf_config = target.checkpoint, target.hf_config
    read = _read_eagle3 if speculative.method == "eagle3" else _read_mtp
    try:
        if speculative.model is not None:
            checkpoint, hf_config = _open(speculative.model, speculative.revision, is_dummy=is_dummy)
        names = frozenset(checkpoint.tensor_names()) if checkpoint is not None else None
        config, feature_layers = read(hf_config, target.decoder, names)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{name}: {error}") from error
    if config.max_position_embeddings < max_model_len:
        logger.info("%s was made for %d tokens: behind these it may guess worse", name, config.max_position_embeddings)
    # Its features, and what it shares, are of the model's dtype.
    files = replace(target, checkpoint=checkpoint, hf_config=hf_config, decoder=config)
    return HeadFiles(files, config, HEADS[speculative.method], feature_layers)


def _open(model: str, revision: str | None, *, is_dummy: bool) -> tuple[Checkpoint | None, dict[str, Any]]:
    source = resolve_source(model, revision=revision, tokenizer_only=is_dummy)
    if source.kind != "folder":
        raise ConfigError("is a GGUF file; a head must be a folder or hub id with safetensors and config.json")
    if is_dummy:
        return None, read_json(source.path / "config.json")
    checkpoint = open_checkpoint(source)
    return checkpoint, checkpoint.hf_config()


def _read_eagle3(
    hf_config: Mapping[str, Any], target: DecoderConfig, names: frozenset[str] | None
) -> tuple[HeadConfig, tuple[int, ...]]:
    """Spellings: SafeAILab's and SGLang's (flat, `midlayer.*`), speculators' (nested, `layers.0.*`)."""
    config = _flat(hf_config)
    decoder = DecoderConfig.from_hf(config)
    given = {name: value for name, value in config.items() if value is not None}
    target_hidden_size = positive_integer(given, "target_hidden_size", default=decoder.hidden_size)
    draft_vocab_size = positive_integer(given, "draft_vocab_size", default=decoder.vocab_size)
    if names is None:
        names = frozenset({"fc.weight", "lm_head.weight", "midlayer.hidden_norm.weight"})
    if "fc.weight" not in names:
        raise CheckpointError("is no EAGLE-3 head: it has no 'fc.weight', the tensor that joins three layers' states")
    if _eagle_config(config).get("use_aux_hidden_state") is False:
        raise CheckpointError("reads the model's last layer alone (use_aux_hidden_state), which is not supported")
    if decoder.num_layers != 1:
        raise CheckpointError(f"has {decoder.num_layers} layers (num_hidden_layers); heads of 1 are supported")
    _check_sizes(decoder.vocab_size, target_hidden_size, target)
    has_embedding = "embed_tokens.weight" in names
    has_head = "lm_head.weight" in names or draft_vocab_size != target.vocab_size
    if decoder.hidden_size != target.hidden_size and not (has_embedding and has_head):
        raise CheckpointError(
            f"has hidden size {decoder.hidden_size}, the model {target.hidden_size}, so it cannot share the model's "
            "embedding and head: it must hold 'embed_tokens.weight' and 'lm_head.weight'"
        )
    head = _head_config(
        replace(decoder, sliding_window=None),
        num_features=_NUM_FEATURE_LAYERS * target.hidden_size,
        draft_vocab_size=draft_vocab_size,
        layer_prefix="midlayer" if any(name.startswith("midlayer.") for name in names) else "layers.0",
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        has_embedding=has_embedding,
        has_head=has_head,
        has_token_map=draft_vocab_size != target.vocab_size or "d2t" in names,
    )
    return head, _feature_layers(config, target.num_layers)


def _flat(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of speculators has the layer's sizes in a mapping of their own."""
    inner = hf_config.get("transformer_layer_config")
    if not isinstance(inner, Mapping):
        return dict(hf_config)
    # What is null outside is said inside.
    return {**inner, **{key: value for key, value in hf_config.items() if value is not None}}


def _feature_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Whose inputs it reads. Named at the top level these are vLLM's, which count so; in `eagle_config` SGLang's, which
    count the layers that these come out of. Without them: EAGLE-3's own choice."""
    given = _layer_ids(config)
    inner = _layer_ids(_eagle_config(config))
    layers = [2, num_layers // 2, num_layers - 3]
    if given:
        layers = given
    elif inner:
        layers = [layer + 1 for layer in inner]
    is_right = len(layers) == _NUM_FEATURE_LAYERS and sorted(set(layers)) == layers
    if not is_right or layers[0] < 0 or layers[-1] > num_layers:
        raise CheckpointError(
            f"reads what enters layers {layers}, which must be three layers in order, from 0 to {num_layers} "
            "(behind the last); name them in its config.json as eagle_aux_hidden_state_layer_ids"
        )
    return tuple(layers)


def _layer_ids(config: Mapping[str, Any]) -> list[int]:
    """What a config says under that name; empty where it does not."""
    value = config.get("eagle_aux_hidden_state_layer_ids")
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        raise CheckpointError(
            f"config.json: 'eagle_aux_hidden_state_layer_ids' must be a list of {_NUM_FEATURE_LAYERS} integers, "
            f"got {value!r}"
        )
    return value


def _eagle_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get("eagle_config")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: 'eagle_config' must be an object, got {value!r}")
    return value


def _read_mtp(
    hf_config: Mapping[str, Any], target: DecoderConfig, names: frozenset[str] | None
) -> tuple[HeadConfig, tuple[int, ...]]:
    """MiMo's, in the checkpoint of the model itself or in one of the same names."""
    decoder = DecoderConfig.from_hf(hf_config)
    if decoder.architecture != "MiMoForCausalLM":
        raise ConfigError(
            f"is of a checkpoint with architecture {decoder.architecture!r}; method 'mtp' knows the format of "
            "'MiMoForCausalLM' (model.mtp_layers.0.*), not DeepSeek-V3's (model.layers.*.eh_proj) and others"
        )
    count = hf_config.get("num_nextn_predict_layers", 1)
    if count != 1:
        raise CheckpointError(f"has num_nextn_predict_layers {count}; one layer is supported, which runs once a draft")
    if names is not None and not any(name.startswith("model.mtp_layers.") for name in names):
        raise CheckpointError("is missing: the checkpoint holds no tensors 'model.mtp_layers.0.*'")
    _check_sizes(decoder.vocab_size, decoder.hidden_size, target)
    head = _head_config(
        replace(decoder, num_layers=1), num_features=target.hidden_size, draft_vocab_size=target.vocab_size
    )
    return head, ()


def _check_sizes(vocab_size: int, hidden_size: int, target: DecoderConfig) -> None:
    if vocab_size != target.vocab_size:
        raise ConfigError(
            f"is for a vocabulary of {vocab_size} tokens, the model has {target.vocab_size}; use a head that was "
            "trained for this model"
        )
    if hidden_size != target.hidden_size:
        raise ConfigError(
            f"is for a model of hidden size {hidden_size}, this one has {target.hidden_size}; use a head that was "
            "trained for this model"
        )


def _head_config(decoder: DecoderConfig, **of_head: Any) -> HeadConfig:
    shared = {field.name: getattr(decoder, field.name) for field in fields(decoder)}
    return HeadConfig(**shared, **of_head)
