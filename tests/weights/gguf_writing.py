"""Writes small GGUF files, as llama.cpp's converter would."""

import gguf
import numpy as np

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 512, 4, 2, 2, 320
HEAD_DIM = HIDDEN // HEADS
METADATA = {
    "context_length": 512,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
}


def block_shapes(layer):
    return {
        f"blk.{layer}.attn_norm.weight": (HIDDEN,),
        f"blk.{layer}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
        f"blk.{layer}.ffn_gate.weight": (FFN, HIDDEN),
        f"blk.{layer}.ffn_up.weight": (FFN, HIDDEN),
        f"blk.{layer}.ffn_down.weight": (HIDDEN, FFN),
    }


def tensors(seed=0, **more):
    """Random float32 tensors of a whole small model, and `more` besides (name with _ for the last dot)."""
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= block_shapes(layer)
    random = np.random.default_rng(seed)
    made = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return made | {name.replace("__", "."): value for name, value in more.items()}


def write(path, contents, *, quantization=None, architecture="llama", metadata=None, tokenizer=None):
    """Write the tensors; those of two dimensions quantised, K types as random blocks, which dequantise as well."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**METADATA, **(metadata or {})}.items():
        add(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer or {}).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    for name, values in contents.items():
        if quantization is None or values.ndim < 2:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, blocks(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def blocks(values, quantization):
    try:
        return gguf.quantize(values, quantization)
    except NotImplementedError:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        rows = (values.shape[0], values.shape[1] // block_size * block_bytes)
        # Bytes below 0x3c: the float16 scales inside the blocks stay finite.
        return np.random.default_rng(1).integers(0, 0x3C, rows, np.uint8)


def rope_order(values, num_heads):
    """Reorder the rows of q or k as llama.cpp's converter does."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
