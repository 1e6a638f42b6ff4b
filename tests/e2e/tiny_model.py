"""A model folder that starts in seconds: a tiny config, and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.checkpoints import TINY

TINY_SHAPES = (
    *("--dtype", "float32", "--device", "cpu", "--token-buckets", "16", "--max-num-batched-tokens", "16"),
    *("--max-num-seqs", "2", "--max-model-len", "128", "--num-gpu-blocks-override", "33"),
)


def write_tokenizer(folder: Path) -> Path:
    """Add a tokenizer of 256 byte tokens and an end of text to a model folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def write_config(folder: Path, vocab_size: int = 257) -> Path:
    """Make a model folder of a config alone; `--load-format dummy` makes up its weights.

    By default it has the tokenizer's words alone: every token that a model makes is text.
    """
    folder.mkdir(parents=True)
    words = {"vocab_size": vocab_size}
    config = TINY | words | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return write_tokenizer(folder)
