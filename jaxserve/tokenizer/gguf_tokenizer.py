"""A tokenizer built from a GGUF file's metadata, which gives the same tokens as llama.cpp does for that file.

Two kinds: `gpt2` is byte-level BPE with ranked merges; `llama` is SentencePiece's BPE, which has a score for each
piece instead of merges, and falls back to byte tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.checkpoint_values import CheckpointValues
from jaxserve.errors import TokenizerError
from jaxserve.tokenizer.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from jaxserve.weights.gguf_header import GGUFHeader

_log = logging.getLogger(__name__)

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
_CHAT_TEMPLATE = "tokenizer.chat_template"
_SPACE = "▁"  # SentencePiece's sign for a space


def tokenizer_from_gguf(header: GGUFHeader) -> Tokenizer:
    """Build the tokenizer, with control and user-defined tokens, bos and eos as the file wants them."""
    metadata = _Metadata(header)
    if metadata.kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata)
    elif metadata.kind == "llama":
        tokenizer, add_bos = _sentence_piece(metadata)
    else:
        raise TokenizerError(
            f"{header.path} has a tokenizer of the kind {metadata.kind!r}; supported in GGUF are 'gpt2' and 'llama'"
        )
    tokenizer.add_special_tokens(metadata.added(_CONTROL, _UNKNOWN, special=True))
    tokenizer.add_tokens(metadata.added(_USER_DEFINED, special=False))
    _add_bos_and_eos(tokenizer, metadata, add_bos)
    return tokenizer


def tokenizer_config_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """Return what tokenizer_config.json would say: special tokens and chat templates."""
    metadata = _Metadata(header)
    config: dict[str, Any] = {}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for key, name in names.items():
        token_id = metadata.token_id(key)
        if token_id is not None:
            config[name] = metadata.tokens[token_id]
    values = CheckpointValues(header.metadata, str(header.path))
    template = values.text(_CHAT_TEMPLATE, default="")
    if template:
        named = {
            key.removeprefix(f"{_CHAT_TEMPLATE}."): values.text(key, default="")
            for key in header.metadata
            if key.startswith(f"{_CHAT_TEMPLATE}.")
        }
        config["chat_template"] = {"default": template, **named} if named else template
    return config


class _Metadata:
    """The `tokenizer.ggml.*` entries, checked."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self._entries = CheckpointValues(header.metadata, str(header.path))
        self.kind = self.text("model", default="")
        self.tokens = self.texts("tokens")
        if not self.tokens:
            raise TokenizerError(f"{self.path} holds no tokenizer: it has no 'tokenizer.ggml.tokens'")
        types = self.numbers("token_type")
        self.types: list[int] = [1] * len(self.tokens) if types is None else types
        if len(self.types) != len(self.tokens):
            raise TokenizerError(f"{self.path} is damaged: {len(self.tokens)} tokens but {len(self.types)} token types")

    def text(self, key: str, *, default: str) -> str:
        return self._entries.text(_key(key), default=default)

    def texts(self, key: str) -> list[str]:
        return self._entries.texts(_key(key))

    def flag(self, key: str, *, default: bool) -> bool:
        return self._entries.flag(_key(key), default=default)

    def numbers(self, key: str) -> list[Any] | None:
        value = self._entries.values.get(_key(key))
        if value is not None and not isinstance(value, np.ndarray):
            raise self._entries.wrong(_key(key), "an array of numbers")
        return None if value is None else value.tolist()

    def token_id(self, name: str, *, default: int | None = None) -> int | None:
        """The id of a special token; None where the file names none, or one that is no token."""
        ids = self._entries.integers(_key(f"{name}_token_id"))
        token_id = ids[0] if ids else default
        return token_id if token_id is not None and token_id < len(self.tokens) else None

    def model(self, merges: list[Any], **options: Any) -> models.BPE:
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        try:
            return models.BPE(vocabulary, merges, **options)
        except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
            raise TokenizerError(f"{self.path} holds a broken tokenizer: {error}") from error

    def added(self, *types: int, special: bool) -> list[AddedToken]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in types and token
        ]


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _byte_level(metadata: _Metadata) -> tuple[Tokenizer, bool]:
    merges = metadata.texts("merges")
    if not merges:
        raise TokenizerError(f"{metadata.path} holds a 'gpt2' tokenizer without 'tokenizer.ggml.merges'")
    pre = _pre_tokenizer(metadata)
    tokenizer = Tokenizer(
        metadata.model([tuple(merge.split(" ", 1)) for merge in merges], ignore_merges=pre.ignore_merges)
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if metadata.flag("add_space_prefix", default=False):
        tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pre_tokenizer(metadata: _Metadata) -> PreTokenizer:
    name = metadata.text("pre", default="")
    if not name:
        _log.warning("%s does not name its pre-tokenizer; taking 'default', as llama.cpp does", metadata.path)
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{metadata.path} wants the pre-tokenizer {name!r:.80}, which is not known; "
            "give the model's own tokenizer.json instead"
        )
    return PRE_TOKENIZERS[name]


def _sentence_piece(metadata: _Metadata) -> tuple[Tokenizer, bool]:
    scores = metadata.numbers("scores")
    if scores is None or len(scores) != len(metadata.tokens):
        raise TokenizerError(f"{metadata.path} holds a 'llama' tokenizer without a score for every token")
    unknown = metadata.token_id("unknown", default=0)
    if unknown is None:
        raise TokenizerError(f"{metadata.path} is damaged: 'tokenizer.ggml.unknown_token_id' is no token")
    merges = _merges_from_scores(metadata, scores)
    model = metadata.model(merges, unk_token=metadata.tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.flag("add_space_prefix", default=True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges_from_scores(metadata: _Metadata, scores: list[float]) -> list[tuple[str, str]]:
    """Rank the merges: two neighbours that together are a piece are joined, the piece of the best score first.

    >>> pieces with scores: "ab" -1, "abc" -2   ->   ("a", "b"), ("ab", "c"); ("a", "bc") only if "bc" is a piece
    """
    mergeable = {
        token: score
        for token, score, kind in zip(metadata.tokens, scores, metadata.types, strict=True)
        if kind not in (_CONTROL, _UNKNOWN, _BYTE) and token
    }
    merges: list[tuple[str, str]] = []
    for piece in sorted(mergeable, key=lambda token: -mergeable[token]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                merges.append((left, right))
    return merges


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: _Metadata, add_bos_by_default: bool) -> None:
    template, special = ["$A"], []
    wanted = {
        "bos": metadata.flag("add_bos_token", default=add_bos_by_default),
        "eos": metadata.flag("add_eos_token", default=False),
    }
    for name, is_wanted in wanted.items():
        if not is_wanted:
            continue
        # llama.cpp's own ids where a 'llama' file does not say; byte-level files always do.
        token_id = metadata.token_id(name, default={"bos": 1, "eos": 2}[name] if metadata.kind == "llama" else None)
        if token_id is None:
            raise TokenizerError(f"{metadata.path} wants {name} added but has no 'tokenizer.ggml.{name}_token_id'")
        token = metadata.tokens[token_id]
        template = [token, *template] if name == "bos" else [*template, token]
        special.append((token, token_id))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
