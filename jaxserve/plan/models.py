"""The model that a launch config names, by its config.json alone: no weights are read, none need be here."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jaxserve.config import ModelSettings
from jaxserve.runner.loading import ModelFiles, describe_model
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.safetensors_files import read_json
from jaxserve.weights.source import resolve_source

# Hub ids whose config.json is at hand: no network is needed, and no licence to be accepted first.
_KNOWN = {
    **dict.fromkeys(("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"), "llama_3_1_8b.json"),
    **dict.fromkeys(
        (
            "meta-llama/Llama-3.1-70B",
            "meta-llama/Llama-3.1-70B-Instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
        ),
        "llama_3_3_70b.json",
    ),
}


def planned_model(settings: ModelSettings, platform: str) -> ModelFiles:
    """What is known of the model without its weights; raises `CheckpointError` where it cannot be found."""
    return describe_model(settings, _hf_config(settings), platform=platform)


def known_config(model: str) -> dict[str, Any]:
    """The config.json of a model that jaxserve knows by its hub id."""
    with resources.as_file(resources.files("jaxserve.plan") / _KNOWN[model]) as path:
        return read_json(path)


def _hf_config(settings: ModelSettings) -> dict[str, Any]:
    if settings.model in _KNOWN and settings.revision is None and not Path(settings.model).exists():
        return known_config(settings.model)
    source = resolve_source(settings.model, revision=settings.revision, tokenizer_only=True)
    if source.kind == "gguf":
        return open_checkpoint(source).hf_config()
    return read_json(source.path / "config.json")
