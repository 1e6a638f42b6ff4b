"""Loading parameters by rules: what fits, what does not, and how much memory it takes."""

import json
import logging
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.models.base import WeightRule
from jaxserve.weights.dummy import DummyCheckpoint
from jaxserve.weights.mapping import load_params
from jaxserve.weights.progress import loading_progress


def plain(name, shape):
    return WeightRule(param=name, sources=(name,), shapes=(shape,), param_shape=shape)


def checkpoint_of(shapes, **config):
    return DummyCheckpoint(config, shapes, dtype=np.float32)


def load(checkpoint, rules, **options):
    options = {"dtype": np.float32, "place": lambda name, array: jax.device_put(array), **options}
    return load_params(checkpoint, rules, **options)


def test_every_parameter_is_read_cast_and_placed_in_order():
    shapes = {f"layer.{index}": (index + 1, 8) for index in range(20)}
    checkpoint = checkpoint_of(shapes)
    placed = []

    def place(name, array):
        placed.append(name)
        return jax.device_put(array)

    params = load(checkpoint, [plain(*item) for item in shapes.items()], dtype=ml_dtypes.bfloat16, place=place)

    assert placed == list(params) == list(shapes)
    for name, value in params.items():
        assert value.dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(np.asarray(value), checkpoint.read(name).astype(ml_dtypes.bfloat16))


def test_several_tensors_become_one_parameter():
    checkpoint = checkpoint_of({"q": (4, 8), "k": (2, 8), "v": (2, 8)})
    rule = WeightRule(
        param="qkv",
        sources=("q", "k", "v"),
        shapes=((4, 8), (2, 8), (2, 8)),
        param_shape=(8, 8),
        assemble=np.concatenate,
    )

    params = load(checkpoint, [rule])

    np.testing.assert_array_equal(np.asarray(params["qkv"])[4:6], checkpoint.read("k"))


def test_missing_tensors_are_named():
    with pytest.raises(CheckpointError, match="lacks 2 tensors of the model: b, c"):
        load(checkpoint_of({"a": (2,)}), [plain("a", (2,)), plain("b", (2,)), plain("c", (2,))])


def test_a_wrong_shape_is_told_with_both_shapes():
    with pytest.raises(CheckpointError, match=r"'a' has shape \[2, 3\], the model wants \[3, 2\]"):
        load(checkpoint_of({"a": (2, 3)}), [plain("a", (3, 2))])


def test_surplus_tensors_are_named():
    with pytest.raises(CheckpointError, match="1 tensors that the model has no place for: ghost"):
        load(checkpoint_of({"a": (2,), "ghost": (2,)}), [plain("a", (2,))])


def test_known_buffers_and_ignored_names_are_no_surplus():
    shapes = {"a": (2,), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,), "mtp.x": (2,)}

    assert list(load(checkpoint_of(shapes), [plain("a", (2,))], ignored=(r"mtp\..*",))) == ["a"]


def test_a_second_copy_of_tied_embeddings_is_no_surplus():
    shapes = {"a": (2,), "lm_head.weight": (2,)}

    # What config.json says is not asked: overrides may say otherwise.
    checkpoint = checkpoint_of(shapes, tie_word_embeddings=False)
    assert list(load(checkpoint, [plain("a", (2,))], tie_embeddings=True)) == ["a"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(checkpoint_of(shapes, tie_word_embeddings=True), [plain("a", (2,))])


def test_nothing_is_read_when_something_does_not_fit():
    checkpoint = checkpoint_of({"a": (2,)})
    placed = []

    with pytest.raises(CheckpointError):
        load(checkpoint, [plain("a", (2,)), plain("b", (2,))], place=lambda name, array: placed.append(name))

    assert placed == []


def test_an_assembly_of_the_wrong_shape_names_the_parameter():
    rule = WeightRule(param="p", sources=("a",), shapes=((2, 3),), param_shape=(3, 2))

    with pytest.raises(CheckpointError, match="parameter 'p'"):
        load(checkpoint_of({"a": (2, 3)}), [rule])


def test_a_failing_read_ends_the_load_and_its_threads():
    class Failing(DummyCheckpoint):
        def read(self, name):
            if name == "t3":
                raise CheckpointError("t3 is damaged")
            return super().read(name)

    shapes = {f"t{index}": (4,) for index in range(50)}

    with pytest.raises(CheckpointError, match="t3 is damaged"):
        load(Failing({}, shapes), [plain(*item) for item in shapes.items()])

    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any("read-weights" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)
    assert not any("read-weights" in thread.name for thread in threading.enumerate())


def test_progress_counts_bytes_up_to_the_total():
    shapes = {"a": (2, 4), "b": (8,)}
    calls = []

    load(checkpoint_of(shapes), [plain(*item) for item in shapes.items()], on_progress=lambda *call: calls.append(call))

    assert calls == [("a", 32, 64), ("b", 64, 64)]


def test_without_a_terminal_progress_is_one_log_line(caplog, capsys):
    caplog.set_level(logging.INFO)

    with loading_progress("loading tiny") as on_progress:
        load(checkpoint_of({"a": (2, 4)}), [plain("a", (2, 4))], on_progress=on_progress)

    assert "loading tiny: 0.00 GB" in caplog.text
    assert capsys.readouterr().err == ""


def test_a_dummy_is_the_same_every_time_and_sane():
    shapes = {"model.norm.weight": (64,), "proj.bias": (64,), "proj.weight": (64, 64), "embed.weight": (4096, 1024)}
    first, second, other = (DummyCheckpoint({}, shapes, seed=seed) for seed in (0, 0, 1))

    assert (first.read("model.norm.weight") == 1).all()
    assert (first.read("proj.bias") == 0).all()
    np.testing.assert_array_equal(first.read("proj.weight"), second.read("proj.weight"))
    assert (first.read("proj.weight") != other.read("proj.weight")).any()
    embedding = first.read("embed.weight").astype(np.float32)
    assert 0.015 < embedding.std() < 0.025
    assert len(np.unique(embedding[:, :8], axis=0)) == 4096  # no two rows alike


PEAK_MEMORY = """
import json, resource, sys
import jax, ml_dtypes, numpy as np
from jaxserve.models.base import WeightRule
from jaxserve.weights.mapping import load_params
from jaxserve.weights.safetensors_files import SafetensorsCheckpoint
from pathlib import Path

checkpoint = SafetensorsCheckpoint(Path(sys.argv[1]))
rules = [
    WeightRule(param=n, sources=(n,), shapes=(checkpoint.shape(n),), param_shape=checkpoint.shape(n))
    for n in checkpoint.tensor_names()
]
jax.block_until_ready(jax.device_put(np.zeros(4)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = load_params(checkpoint, rules, dtype=ml_dtypes.bfloat16, place=lambda name, array: jax.device_put(array))
jax.block_until_ready(params)
print(json.dumps({"grown": peak() - before, "model": sum(array.nbytes for array in params.values())}))
"""


def test_loading_holds_the_model_once_and_the_largest_tensor(tmp_path):
    mib = 1 << 20
    num_tensors, tensor_bytes, largest_bytes = 12, 24 * mib, 64 * mib
    sizes = {f"t{index}": tensor_bytes for index in range(num_tensors)} | {"largest": largest_bytes}
    header, offset = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            file.write(bytes(size))
    (tmp_path / "config.json").write_text("{}")

    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)

    assert figures["model"] == sum(sizes.values())
    assert figures["grown"] < figures["model"] + largest_bytes + 64 * mib + 32 * mib
