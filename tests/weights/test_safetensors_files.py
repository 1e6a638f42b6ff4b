"""Reading safetensors folders, and one clear line for each way they can be broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.errors import CheckpointError
from jaxserve.weights.safetensors_files import INDEX_NAME, SINGLE_NAME, SafetensorsCheckpoint

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "ids": np.array([[1, 2]], dtype=np.int64),
    "scalar": np.array(3.5, dtype=np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def write_folder(folder, tensors=None, config=None):
    save_file(TENSORS if tensors is None else tensors, folder / SINGLE_NAME)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    return folder


def write_shards(folder, weight_map=None):
    names = list(TENSORS)
    shards = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for shard, members in shards.items():
        save_file({name: TENSORS[name] for name in members}, folder / shard)
    index = {"weight_map": weight_map or {name: shard for shard, members in shards.items() for name in members}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_every_tensor_comes_back_as_it_was_written(tmp_path, write):
    checkpoint = SafetensorsCheckpoint(write(tmp_path))

    assert set(checkpoint.tensor_names()) == set(TENSORS)
    for name, wanted in TENSORS.items():
        given_back = checkpoint.read(name)
        assert checkpoint.shape(name) == wanted.shape
        assert given_back.dtype == wanted.dtype
        np.testing.assert_array_equal(given_back, wanted)


def test_float8_is_read_as_the_type_it_is(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn)
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    (tmp_path / "config.json").write_text("{}")

    np.testing.assert_array_equal(SafetensorsCheckpoint(tmp_path).read("w"), values)


def test_the_configs_are_read(tmp_path):
    folder = write_folder(tmp_path, config={"hidden_size": 8})
    assert SafetensorsCheckpoint(folder).generation_config() == {}

    (folder / "generation_config.json").write_text('{"temperature": 0.6}')

    assert SafetensorsCheckpoint(folder).generation_config() == {"temperature": 0.6}
    assert SafetensorsCheckpoint(folder).hf_config() == {"hidden_size": 8}


def test_memory_is_aligned_as_xla_wants_it(tmp_path):
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path))

    assert all(checkpoint.read(name).ctypes.data % 64 == 0 for name in ("a.weight", "b.weight", "half"))


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused_when_it_is_opened(tmp_path, keep):
    path = write_folder(tmp_path) / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(CheckpointError, match=r"model\.safetensors .*(truncated|damaged)"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_that_shrinks_later_is_an_error_and_not_a_crash(tmp_path):
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path))
    path = tmp_path / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(CheckpointError, match="truncated"):
        for name in checkpoint.tensor_names():
            checkpoint.read(name)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 500), byte=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(tmp_path, position, byte):
    data = bytearray((write_folder(tmp_path) / SINGLE_NAME).read_bytes())
    data[position % len(data)] = byte
    (tmp_path / SINGLE_NAME).write_bytes(data)

    try:
        checkpoint = SafetensorsCheckpoint(tmp_path)
        for name in checkpoint.tensor_names():
            checkpoint.read(name)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
    ],
)
def test_an_entry_that_makes_no_sense_is_named(tmp_path, entry):
    header = json.dumps({"w": entry}).encode()
    (write_folder(tmp_path) / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

    with pytest.raises(CheckpointError, match="'w'"):
        SafetensorsCheckpoint(tmp_path)


def test_json_of_any_depth_is_refused_in_one_line(tmp_path):
    (write_folder(tmp_path) / "config.json").write_text("[" * 100_000)

    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("shard", [7, ["one.safetensors"], None])
def test_an_index_that_names_no_files_is_refused(tmp_path, shard):
    folder = write_shards(tmp_path, weight_map={"a.weight": "one.safetensors", "b.weight": shard})

    with pytest.raises(CheckpointError, match="which is not a file name"):
        SafetensorsCheckpoint(folder)


def test_a_missing_shard_is_named(tmp_path):
    (write_shards(tmp_path) / "two.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"'two\.safetensors', which is missing"):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_naming_absent_tensors_is_refused(tmp_path):
    folder = write_shards(tmp_path, weight_map={"a.weight": "one.safetensors", "ghost": "one.safetensors"})

    with pytest.raises(CheckpointError, match="no shard holds: ghost"):
        SafetensorsCheckpoint(folder)


def test_an_index_cannot_reach_out_of_its_folder(tmp_path):
    folder = write_shards(tmp_path, weight_map={"a.weight": "../one.safetensors"})

    with pytest.raises(CheckpointError, match="not a file name"):
        SafetensorsCheckpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', ""])
def test_a_broken_config_is_refused(tmp_path, text):
    (write_folder(tmp_path) / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"config\.json"):
        SafetensorsCheckpoint(tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file$"):
        SafetensorsCheckpoint(tmp_path)

    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        SafetensorsCheckpoint(tmp_path)

    (tmp_path / "q4.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give its path: .*q4\.gguf"):
        SafetensorsCheckpoint(tmp_path)


def test_an_empty_folder_misses_its_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        SafetensorsCheckpoint(tmp_path)


def test_several_files_need_an_index(tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()

    with pytest.raises(CheckpointError, match="2 .safetensors files but no"):
        SafetensorsCheckpoint(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor 'ghost'"):
        SafetensorsCheckpoint(write_folder(tmp_path)).read("ghost")
