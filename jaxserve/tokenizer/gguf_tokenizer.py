"""A tokenizer built from a GGUF file's metadata, which gives the same tokens as llama.cpp does for that file.

Two kinds: `gpt2` is byte-level BPE with ranked merges; `llama` is SentencePiece's BPE, which has a score for each
piece instead of merges, and falls back to byte tokens.
"""

from __future__ import annotations

import logging
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import TokenizerError
from jaxserve.tokenizer.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from jaxserve.weights.gguf_header import GGUFHeader

_log = logging.getLogger(__name__)

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
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
        token_id = metadata.get(f"{key}_token_id")
        if token_id is not None and int(token_id) < len(metadata.tokens):
            config[name] = metadata.tokens[int(token_id)]
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None:
        named = {
            key.removeprefix("tokenizer.chat_template."): value
            for key, value in header.metadata.items()
            if key.startswith("tokenizer.chat_template.")
        }
        config["chat_template"] = {"default": template, **named} if named else template
    return config


class _Metadata:
    """The `tokenizer.ggml.*` entries, checked."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self._entries = header.metadata
        self.kind = self.get("model")
        self.tokens: list[str] = self.get("tokens") or []
        if not self.tokens:
            raise TokenizerError(f"{self.path} holds no tokenizer: it has no 'tokenizer.ggml.tokens'")
        types = self.get("token_type")
        self.types: list[int] = [1] * len(self.tokens) if types is None else types.tolist()
        if len(self.types) != len(self.tokens):
            raise TokenizerError(f"{self.path} is damaged: {len(self.tokens)} tokens but {len(self.types)} token types")

    def get(self, key: str, default: Any = None) -> Any:
        return self._entries.get(f"tokenizer.ggml.{key}", default)

    def vocabulary(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def added(self, *types: int, special: bool) -> list[AddedToken]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in types and token
        ]


def _byte_level(metadata: _Metadata) -> tuple[Tokenizer, bool]:
    merges = metadata.get("merges")
    if merges is None:
        raise TokenizerError(f"{metadata.path} holds a 'gpt2' tokenizer without 'tokenizer.ggml.merges'")
    pre = _pre_tokenizer(metadata)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = models.BPE(metadata.vocabulary(), pairs, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        raise TokenizerError(f"{metadata.path} holds a broken tokenizer: {error}") from error
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if metadata.get("add_space_prefix", False):
        tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pre_tokenizer(metadata: _Metadata) -> PreTokenizer:
    name = metadata.get("pre")
    if name is None:
        _log.warning("%s does not name its pre-tokenizer; taking 'default', as llama.cpp does", metadata.path)
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{metadata.path} wants the pre-tokenizer {name!r}, which is not known; "
            "give the model's own tokenizer.json instead"
        )
    return PRE_TOKENIZERS[name]


def _sentence_piece(metadata: _Metadata) -> tuple[Tokenizer, bool]:
    scores = metadata.get("scores")
    if scores is None or len(scores) != len(metadata.tokens):
        raise TokenizerError(f"{metadata.path} holds a 'llama' tokenizer without a score for every token")
    unknown = metadata.get("unknown_token_id", 0)
    model = models.BPE(
        metadata.vocabulary(),
        _merges_from_scores(metadata, scores.tolist()),
        unk_token=metadata.tokens[int(unknown)],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("add_space_prefix", True)
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
    wanted = {"bos": metadata.get("add_bos_token", add_bos_by_default), "eos": metadata.get("add_eos_token", False)}
    for name, is_wanted in wanted.items():
        if not is_wanted:
            continue
        # llama.cpp's own ids where a 'llama' file does not say; byte-level files always do.
        token_id = metadata.get(f"{name}_token_id", {"bos": 1, "eos": 2}[name] if metadata.kind == "llama" else None)
        if token_id is None or int(token_id) >= len(metadata.tokens):
            raise TokenizerError(f"{metadata.path} wants {name} added but has no 'tokenizer.ggml.{name}_token_id'")
        token = metadata.tokens[int(token_id)]
        template = [token, *template] if name == "bos" else [*template, token]
        special.append((token, int(token_id)))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
