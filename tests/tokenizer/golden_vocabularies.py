"""The golden files of this folder, as GGUF headers."""

import json
from pathlib import Path

import numpy as np

from jaxserve.weights.gguf_header import GGUFHeader

FOLDER = Path(__file__).parent / "golden"


def load(name):
    return json.loads((FOLDER / name).read_text())


def header(entries, **changes):
    """Return a GGUF header with the given `tokenizer.ggml.*` entries; arrays of numbers as the reader gives them."""
    metadata = {}
    for key, value in {**entries, **changes}.items():
        numbers = isinstance(value, list) and not isinstance(value[0], str)
        metadata[f"tokenizer.ggml.{key}"] = np.array(value) if numbers else value
    return GGUFHeader(Path("vocabulary.gguf"), metadata)
