"""Small tokenizers in the manner of Llama 2, Gemma and T5: pieces with `▁` for a space, and bytes for all else."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>"]
EOS = 2
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "{"), ("▁", '"'), ('"', ":"), ("c", "a"), ("ca", "f")]
# Without q, x, z and all capital letters: those are bytes, as whatever is not ASCII.
PIECES = ["▁", *'abcdefghijklmnoprstuvwy0123456789{}[]":,.-', *("".join(merge) for merge in MERGES)]
VOCABULARY = [*SPECIAL, *BYTES, *PIECES]


def like_llama() -> Tokenizer:
    """Byte pair encoding; a space in front of each text, which decoding takes away."""
    backend = _byte_pairs()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([*_to_text(), decoders.Strip(" ", 1, 0)])
    return backend


def like_gemma() -> Tokenizer:
    """The same without that space; runs of spaces, and of lines, are tokens that were added."""
    backend = _byte_pairs()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(_to_text())
    backend.add_tokens([AddedToken(run, normalized=False) for run in ("▁▁", "▁▁▁", "\n\n")])
    return backend


def like_t5() -> Tokenizer:
    """Unigrams, and no bytes: what has no piece cannot be said."""
    scores = [(piece, -5.0 - len(piece) / 10) for piece in [*SPECIAL, *PIECES, "é", "你"]]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return backend


def write_sentence_piece(folder: Path) -> Path:
    """Add `like_llama` to a model folder."""
    like_llama().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[EOS]}))
    return folder


def _byte_pairs() -> Tokenizer:
    ids = {piece: token_id for token_id, piece in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(ids, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(SPECIAL)
    return backend


def _to_text() -> list:
    return [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
