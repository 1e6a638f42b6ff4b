"""GGUF files that are truncated, damaged or mistyped: one line names what is wrong, at once and in little memory."""

import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError
from jaxserve.models.base import DecoderConfig
from jaxserve.weights.gguf_file import GGUFCheckpoint
from jaxserve.weights.gguf_header import read_gguf_header
from tests.weights import gguf_writing as writing

HEADER_BYTES = 1536  # of the small file, all but what the last tensor's entry ends with
MAX_BYTES = 50_000_000  # to open it in; the largest array that it can name honestly has a few hundred kilobytes


@pytest.fixture(scope="session")
def small_file(tmp_path_factory):
    return writing.write(tmp_path_factory.mktemp("gguf") / "small.gguf", writing.tensors())


@pytest.fixture
def damaged(tmp_path, small_file):
    """Write the small file with the first of `old` as `new`, of the same length."""

    def write(old: bytes, new: bytes, tokenizer=None):
        data = small_file.read_bytes()
        if tokenizer is not None:
            data = writing.write(tmp_path / "whole.gguf", writing.tensors(), tokenizer=tokenizer).read_bytes()
        assert len(old) == len(new) and old in data
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data.replace(old, new, 1))
        return path

    return write


def tensor_info(name: str, *dims: int, kind: int = 0, offset: int | None = None) -> bytes:
    """What the header says of a tensor; without its offset where that is None."""
    text = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    text += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<I", kind)
    return text if offset is None else text + struct.pack("<Q", offset)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.5, 0.99999])
def test_a_truncated_file_is_refused_when_it_is_opened(tmp_path, small_file, share):
    data = small_file.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(len(data) * share)])

    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        GGUFCheckpoint(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))

    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFCheckpoint(path)


def test_an_unknown_version_is_named(tmp_path, small_file):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + small_file.read_bytes()[8:4096])

    with pytest.raises(CheckpointError, match="version 9"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", "holds the tensor 'blk.0.attn_q.weight' twice"),
        (b"llama.block_count", b"general.file_type", "lacks the metadata 'llama.block_count'"),
        (tensor_info("output_norm.weight", 256), tensor_info("output_norm.weight", 0), "has no whole F32 row"),
        (
            tensor_info("output_norm.weight", 256),
            tensor_info("output_norm.weight", 128),
            "before it ends at 328192",
        ),
        (tensor_info("output_norm.weight", 256), tensor_info("output_norm.weight", 2**60), "is truncated"),
        (
            tensor_info("output_norm.weight", 256, offset=327680),
            tensor_info("output_norm.weight", 256, offset=327712),
            "'output_norm.weight' is said to begin at byte 327712 of the data, the one before it ends at 327680",
        ),
        (
            b"output_norm.weight" + struct.pack("<I", 1),
            b"output_norm.weight" + struct.pack("<I", 10**9),
            "'output_norm.weight' has 1000000000 dimensions",
        ),
    ],
)
def test_a_damaged_header_is_named(damaged, old, new, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(damaged(old, new))


@pytest.mark.parametrize("position", [8, 16])
def test_a_wrong_count_of_tensors_or_entries_ends_where_the_file_does(tmp_path, small_file, position):
    data = bytearray(small_file.read_bytes())
    data[position + 7] = 0x10
    (tmp_path / "m.gguf").write_bytes(data)

    with pytest.raises(CheckpointError, match=r"m\.gguf is (truncated|damaged)"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_metadata_that_are_given_twice_are_refused(damaged):
    with pytest.raises(CheckpointError, match=r"holds the metadata 'tokenizer\.ggml\.pre1' twice"):
        GGUFCheckpoint(damaged(b"pre2", b"pre1", tokenizer={"pre1": "a", "pre2": "b"}))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (struct.pack("<IQ", 8, 2), struct.pack("<IQ", 8, 2**60), "ends inside a list of strings"),
        (struct.pack("<IQ", 8, 2), struct.pack("<IQ", 5, 2**60), "its header ends at byte"),
        (struct.pack("<IQ", 8, 2), struct.pack("<IQ", 9, 2), "an array of the unknown type 9"),
        (struct.pack("<IQ", 8, 2) + struct.pack("<Q", 1), struct.pack("<IQ", 8, 2) + struct.pack("<Q", 2**60), "ends"),
    ],
)
def test_a_damaged_array_is_named(damaged, old, new, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(damaged(old, new, tokenizer={"tokens": ["a", "b"]}))


@pytest.mark.parametrize(
    ("key", "largest"),
    [
        ("embedding_length", 262144),
        ("feed_forward_length", 1048576),
        ("block_count", 2048),
        ("attention.head_count", 2048),
        ("attention.head_count_kv", 2048),
        ("attention.key_length", 8192),
        ("rope.dimension_count", 8192),
        ("context_length", 134217728),
        ("attention.sliding_window", 2147483647),
    ],
)
def test_a_size_beyond_any_model_is_refused_at_once(tmp_path, key, largest):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), metadata={key: 4_000_000_000})

    with pytest.raises(CheckpointError, match=rf"m\.gguf: 'llama\.{key}' must be at most {largest}, got 4000000000"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": "two"}, "'llama.block_count' must be a positive integer, got 'two'"),
        ({"context_length": 0}, "'llama.context_length' must be a positive integer, got 0"),
        ({"attention.head_count": [4, 2]}, "'llama.attention.head_count' differs from layer to layer"),
        ({"rope.freq_base": "x"}, "'llama.rope.freq_base' must be a number above 1, got 'x'"),
        ({"rope.freq_base": float("inf")}, "'llama.rope.freq_base' must be a number that float32 holds"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon' must be a positive number, got nan"),
        ({"rope.scaling.type": 5}, "'llama.rope.scaling.type' must be text, got 5"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": "x"}, "'llama.rope.scaling.factor' must be a positive"),
        ({"expert_count": "many"}, "'llama.expert_count' must be an integer from 0"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(writing.write(tmp_path / "m.gguf", writing.tensors(), metadata=metadata))


def test_a_token_id_of_another_type_is_named(tmp_path):
    path = writing.write(tmp_path / "m.gguf", writing.tensors(), tokenizer={"eos_token_id": "</s>"})

    with pytest.raises(CheckpointError, match=r"'tokenizer\.ggml\.eos_token_id' must be an integer from 0"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("alignment", [0, 33])
def test_an_alignment_that_is_none_is_named(damaged, alignment):
    entry = b"llama.context_length" + struct.pack("<II", 4, 512)
    wrong = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, alignment)

    with pytest.raises(CheckpointError, match="alignment"):
        GGUFCheckpoint(damaged(struct.pack("<Q", 20) + entry, wrong + b"\0" * 3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, HEADER_BYTES), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_harmless_in_little_memory(tmp_path, small_file, changes):
    data = bytearray(small_file.read_bytes())
    for position, byte in changes:
        data[position] = byte
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        DecoderConfig.from_hf(GGUFCheckpoint(path).hf_config())
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < MAX_BYTES


def test_the_damaged_part_is_the_header(small_file):
    first = min(tensor.offset for tensor in read_gguf_header(small_file).tensors.values())
    assert HEADER_BYTES < first < HEADER_BYTES + 64
