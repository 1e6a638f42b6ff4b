"""Reads what a tokenizer needs from a model folder or a GGUF file."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.checkpoint_values import CheckpointValues
from jaxserve.errors import TokenizerError
from jaxserve.weights.source import ModelSource

_log = logging.getLogger(__name__)

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer and what surrounds it, whatever the files look like."""

    name: str
    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"
    eos_token_ids: tuple[int, ...] = ()  # of config.json and generation_config.json
    chat_template: str | dict[str, str] | None = None


def read_tokenizer_files(source: ModelSource) -> TokenizerFiles:
    """Read a source's tokenizer; `TokenizerError` says what is missing."""
    return _from_gguf(source.path) if source.kind == "gguf" else _from_folder(source.path)


def _from_gguf(path: Path) -> TokenizerFiles:
    from jaxserve.tokenizer.gguf_tokenizer import tokenizer_config_from_gguf, tokenizer_from_gguf
    from jaxserve.weights.gguf_config import token_ids_from_gguf
    from jaxserve.weights.gguf_header import read_gguf_header

    header = read_gguf_header(path)
    config = tokenizer_config_from_gguf(header)
    return TokenizerFiles(
        name=str(path),
        backend=tokenizer_from_gguf(header),
        special_tokens=_special_tokens(config),
        eos_token_ids=_eos_ids(CheckpointValues(token_ids_from_gguf(header), str(path))),
        chat_template=config.get("chat_template"),
    )


def _from_folder(folder: Path) -> TokenizerFiles:
    config = _read_json(folder / "tokenizer_config.json")
    special_map = _read_json(folder / "special_tokens_map.json")
    named_by = ("config.json", "generation_config.json")
    eos = [_eos_ids(CheckpointValues(_read_json(folder / name), name)) for name in named_by]
    return TokenizerFiles(
        name=str(folder),
        backend=_backend(folder),
        special_tokens=_special_tokens(special_map) | _special_tokens(config),
        eos_token_ids=tuple(itertools.chain.from_iterable(eos)),
        chat_template=_chat_template(folder, config),
    )


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        return _converted(folder)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path} is not a tokenizer that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """Let transformers make a fast tokenizer of older files; slow to start, and said so."""
    if not any((folder / name).exists() for name in _SLOW_FILES):
        raise TokenizerError(f"{folder} holds no tokenizer: neither tokenizer.json nor {', '.join(_SLOW_FILES)}")
    _log.warning("%s has no tokenizer.json; converting its older tokenizer files, which takes a while", folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer class of transformers trips over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(f"the tokenizer in {folder} cannot be converted: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(f"the tokenizer in {folder} has no fast form; add a tokenizer.json")
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the named special tokens, given as strings or as the dicts of older files."""
    tokens: dict[str, str] = {}
    for key in SPECIAL_TOKEN_NAMES:
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def _eos_ids(config: CheckpointValues) -> tuple[int, ...]:
    return tuple(config.integers("eos_token_id") or config.within("text_config").integers("eos_token_id"))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or several by name; a file of its own goes before tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    named = {file.stem: _read_text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if path.exists():
        default = _read_text(path)
        return {"default": default, **named} if named else default
    template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if template is None or isinstance(template, str):
        return template
    named = {entry["name"]: entry["template"] for entry in template} if _are_named_templates(template) else template
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise TokenizerError(f"{folder} has a chat_template that is neither a string nor a list of named ones")
    return named


def _are_named_templates(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
