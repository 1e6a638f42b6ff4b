"""Writes the golden token ids of this folder with llama.cpp; the JSON files name the version that made them.

    pip install llama-cpp-python gguf        # in an environment of its own
    python make_golden.py MODEL.gguf         # SmolLM2-135M-Instruct

`smollm2.json`: the strings in it, as the model's own file tokenises them.
`pre_tokenizers.json`: a small vocabulary whose merges cross every boundary a pre-tokenizer could set, and its tokens
for each `tokenizer.ggml.pre`; and the same as a SentencePiece vocabulary. The strings and the vocabulary are kept as
they are.
"""

import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
from gguf import GGUFWriter

FOLDER = Path(__file__).parent


def tokenize(path, strings):
    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in strings]


def vocabulary_file(path, entries):
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    for key, value in entries.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write(name, content):
    content["made_with"] = f"llama-cpp-python {llama_cpp.__version__}"
    (FOLDER / name).write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")


def main(model):
    smollm2 = json.loads((FOLDER / "smollm2.json").read_text())
    smollm2["ids"] = tokenize(model, smollm2["strings"])
    write("smollm2.json", smollm2)
    small = json.loads((FOLDER / "pre_tokenizers.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        for name in small["byte_level_ids"]:
            vocabulary_file(path, {**small["byte_level"], "pre": name})
            small["byte_level_ids"][name] = tokenize(path, small["strings"])
        vocabulary_file(path, small["sentence_piece"])
        small["sentence_piece_ids"] = tokenize(path, small["strings"])
    write("pre_tokenizers.json", small)


if __name__ == "__main__":
    main(sys.argv[1])
