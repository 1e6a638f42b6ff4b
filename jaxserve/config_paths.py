"""`with_absolute_paths`: a config whose files are found from any working folder."""

from __future__ import annotations

import os
from pathlib import Path

from jaxserve.config import Config

_FILES = ("model", "tokenizer", "chat_template", "compilation_cache_dir")  # settings that may be paths


def with_absolute_paths(config: Config) -> Config:
    """The config with files named from the root, for processes that run in another folder; what is no path stays."""
    flat = {**config.model.model_dump(), **config.runtime.model_dump()}
    found = {name: flat[name] for name in _FILES if flat[name] and Path(flat[name]).exists()}
    config = config.with_values(**{name: os.path.abspath(path) for name, path in found.items()})
    drafts = config.speculative.speculative_config
    if drafts is not None and drafts.model and Path(drafts.model).exists():
        values = drafts.model_dump() | {"model": os.path.abspath(drafts.model)}
        config = config.with_values(speculative_config=values)
    return config
