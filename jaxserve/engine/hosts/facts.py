"""What must be the same on all hosts of a group, since all must run the same programs on the same weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jaxserve
from jaxserve.config import Config
from jaxserve.weights.safetensors_files import read_json
from jaxserve.weights.source import resolve_source

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")

# Sections whose settings shape the programs or their inputs, and the settings in them that do not.
_SECTIONS = ("model", "cache", "scheduler", "speculative", "parallel", "runtime")
_OF_A_HOST = {
    "model", "tokenizer", "served_model_name", "revision", "chat_template", "generation_config",
    "node_rank", "dist_init_addr", "distributed_executor_backend", "dist_timeout_s", "heartbeat_timeout_s",
    "step_timeout_s", "compilation_cache_dir", "compile_threads", "max_queued_requests", "scheduling_policy",
}  # fmt: skip

_NUM_SAMPLES = 64  # places of a weight file that are read
_SAMPLE_BYTES = 4096


def facts_of(config: Config) -> dict[str, str]:
    """Name -> value of everything that must not differ; reads the checkpoint's files, and fetches it if need be.

    Where a model's files are may differ from host to host, what is in them may not.
    """
    facts = {"version of jaxserve": jaxserve.__version__}
    facts |= {f"version of {name}": _version(name) for name in PACKAGES}
    tree = config.model_dump(mode="json")
    for section in _SECTIONS:
        facts |= {name: json.dumps(value) for name, value in tree[section].items() if name not in _OF_A_HOST}
    is_dummy = config.model.load_format == "dummy"
    facts["checkpoint"] = _checkpoint_digest(config.model.model, config.model.revision, is_dummy=is_dummy)
    if (speculative := config.speculative.speculative_config) is not None:
        facts["speculative_config"] = json.dumps(speculative.model_dump(mode="json", exclude={"model"}))
        if speculative.model is not None:
            facts["draft model's checkpoint"] = _checkpoint_digest(speculative.model, None, is_dummy=is_dummy)
    return facts


def difference(leader: dict[str, str], follower: dict[str, str]) -> str | None:
    """The first fact that differs, as a sentence; None where all are the same.

    >>> difference({"max_num_seqs": "8"}, {"max_num_seqs": "16"})
    'max_num_seqs is 16 here, but 8 on node rank 0'
    """
    for name in [*leader, *(name for name in follower if name not in leader)]:
        ours, theirs = leader.get(name, "unknown"), follower.get(name, "unknown")
        if ours != theirs:
            return f"{name} is {theirs} here, but {ours} on node rank 0"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _checkpoint_digest(model: str, revision: str | None, *, is_dummy: bool) -> str:
    """Of config.json, and of samples of the weights: enough to tell two checkpoints apart, no check of every byte."""
    source = resolve_source(model, revision=revision, tokenizer_only=is_dummy)
    digest = hashlib.sha256()
    if source.kind == "folder":
        digest.update(json.dumps(read_json(source.path / "config.json"), sort_keys=True).encode())
        files = [] if is_dummy else sorted(source.path.glob("*.safetensors"))
    else:
        files = [source.path]
    for file in files:
        digest.update(str(file.stat().st_size).encode())
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()[:16]


def _samples(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        for index in range(_NUM_SAMPLES):
            opened.seek(max(size - _SAMPLE_BYTES, 0) * index // (_NUM_SAMPLES - 1))
            yield opened.read(_SAMPLE_BYTES)
