"""`open_model` holds a config against its checkpoint before anything is built by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import ModelSettings
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.llama import Llama
from jaxserve.runner.loading import open_model
from tests.checkpoints import TINY, save_random_llama
from tests.weights import gguf_writing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be built."""
    monkeypatch.setattr(Llama, "__init__", lambda *_, **__: pytest.fail("a model was built"))


def open_with(folder: Path, **changes: Any) -> None:
    open_model(ModelSettings(model=str(folder), hf_overrides=changes))


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2000}, "lacks 17973 tensors of the model: model.layers.10.input_layernorm.weight, "),
        ({"num_hidden_layers": 2}, "holds 9 tensors that the model has no place for: model.layers.2"),
        ({"head_dim": 8192}, r"'model.layers.0.self_attn.o_proj.weight' has shape \[64, 128\], the model wants"),
        ({"vocab_size": 300}, r"'model.embed_tokens.weight' has shape \[320, 64\], the model wants \[300, 64\]"),
        ({"architectures": ["LlamaForCausalLN"]}, "architecture 'LlamaForCausalLN' is not supported; did you mean"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused_before_a_model_is_built(checkpoint, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_with(checkpoint, **changes)


def test_a_config_that_fits_is_opened(checkpoint):
    assert open_model(ModelSettings(model=str(checkpoint))).decoder.num_layers == TINY["num_hidden_layers"]


def test_random_weights_fit_any_config(checkpoint):
    settings = ModelSettings(model=str(checkpoint), load_format="dummy", hf_overrides={"num_hidden_layers": 2})
    assert open_model(settings).decoder.num_layers == 2


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_sequence_that_is_no_token_is_left_out_with_a_warning(checkpoint, tmp_path, name, caplog):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    entries = json.loads((checkpoint / name).read_text())
    if name == "config.json":
        (tmp_path / "generation_config.json").unlink()
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(json.dumps(entries | {"eos_token_id": [2, 320]}))
    assert open_model(ModelSettings(model=str(tmp_path))).eos_token_ids == [2]
    assert "eos_token_id [2, 320] is not all in the vocabulary of 320" in caplog.text
    (tmp_path / name).write_text(json.dumps(entries | {"eos_token_id": 10**12}))
    with pytest.raises(CheckpointError, match="eos_token_id' must be an integer from 0"):
        open_model(ModelSettings(model=str(tmp_path)))


def test_a_quantised_checkpoint_is_refused_even_where_its_tensors_are_plain(checkpoint):
    with pytest.raises(CheckpointError, match="safetensors quantised by 'awq' are not supported"):
        open_with(checkpoint, quantization_config={"quant_method": "awq"})
    open_with(checkpoint, quantization_config=None)


def test_a_load_format_that_the_files_are_not_in_is_refused(checkpoint, tmp_path):
    (tmp_path / "folder.gguf").symlink_to(checkpoint)
    with pytest.raises(ConfigError, match=r"load_format is 'gguf', but model .*folder\.gguf' is safetensors; leave"):
        open_model(ModelSettings(model=str(tmp_path / "folder.gguf"), load_format="gguf"))

    path = gguf_writing.write(tmp_path / "m.gguf", gguf_writing.tensors())
    with pytest.raises(ConfigError, match=r"load_format is 'safetensors', but model .*m\.gguf' is gguf; leave"):
        open_model(ModelSettings(model=str(path), load_format="safetensors"))
    assert open_model(ModelSettings(model=str(path), load_format="gguf", dtype="float32")).dtype == np.float32


def test_a_gguf_file_whose_metadata_do_not_fit_its_tensors_is_refused(tmp_path):
    path = gguf_writing.write(tmp_path / "m.gguf", gguf_writing.tensors(), metadata={"block_count": 3})
    with pytest.raises(CheckpointError, match=r"m\.gguf lacks 9 tensors of the model: model\.layers\.2"):
        open_with(path)
