"""What the compiled step of a mesh sends between devices, and what each device holds of weights and KV pools."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.config import ModelSettings
from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.plan.hlo import collectives
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.loading import load_weights, open_model
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import Programs
from jaxserve.sampling.inputs import VARIANTS
from jaxserve.weights import mapping
from tests.checkpoints import save_random_llama
from tests.sampling.test_split_vocabulary import EXPECTED

pytestmark = pytest.mark.usefixtures("fused_as_served")

NUM_LAYERS = 3
NUM_BLOCKS = 9
BUCKETS = Buckets((8,), (8,))
MESHES = [(2, 1), (4, 1), (8, 1), (4, 2), (2, 4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    return save_random_llama(folder, num_hidden_layers=NUM_LAYERS, num_key_value_heads=4, vocab_size=2048)


def graph_of(checkpoint: Path, *, tensor: int, data: int = 1) -> ModelGraph:
    files = open_model(ModelSettings(model=str(checkpoint)))
    mesh = make_mesh(tensor, data_parallel_size=data)
    backend = choose_backend(files.decoder, dtype=np.float32, block_size=16, mesh=mesh)
    return ModelGraph(files.decoder, dtype=np.float32, backend=backend)


def programs_of(graph: ModelGraph) -> Programs:
    shapes = ProgramShapes(
        buckets=BUCKETS, kv_spec=graph.kv_cache_spec(), num_blocks=NUM_BLOCKS, max_num_seqs=8, max_model_len=64
    )
    return Programs(graph, shapes)


def sent(lowered: jax.stages.Lowered) -> dict[str, int]:
    return collectives(lowered.compile().as_text() or "")


@pytest.mark.parametrize(("tensor", "data"), MESHES)
def test_a_step_sums_over_devices_once_for_the_embedding_and_twice_a_layer(checkpoint, tensor, data):
    programs = programs_of(graph_of(checkpoint, tensor=tensor, data=data))
    assert sent(programs.lower_forward(BUCKETS.pick(8))) == {"all-reduce": 2 * NUM_LAYERS + 1}


def test_data_shards_send_each_other_nothing(checkpoint):
    programs = programs_of(graph_of(checkpoint, tensor=1, data=4))
    assert sent(programs.lower_forward(BUCKETS.pick(8))) == {}
    assert [sent(programs.lower_sample(8, variant)) for variant in VARIANTS] == [{}] * 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tensor", "data"), [(4, 1), (2, 2)])
def test_the_step_s_sampler_sends_what_a_split_vocabulary_needs_and_no_more(checkpoint, tensor, data, variant):
    programs = programs_of(graph_of(checkpoint, tensor=tensor, data=data))
    assert sent(programs.lower_sample(8, variant)) == EXPECTED[variant]


def bytes_of_a_device(arrays: Iterator[jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def test_each_device_holds_its_part_of_the_weights_and_of_the_pool(checkpoint):
    weights, pools = {}, {}
    for tensor in (1, 2, 4, 8):
        graph = graph_of(checkpoint, tensor=tensor)
        weights[tensor] = bytes_of_a_device(iter(graph.abstract_params().values()))
        pools[tensor] = bytes_of_a_device(iter(jax.tree.leaves(graph.kv_cache_spec().abstract(NUM_BLOCKS, graph.mesh))))
    norms = (2 * NUM_LAYERS + 1) * 64 * 4  # every device has them
    split = weights[1] - norms
    assert [weights[n] - norms for n in (2, 4)] == [split // 2, split // 4]
    copies = NUM_LAYERS * 2 * 4 * 16 * 64 * 4  # eight devices hold four KV heads' projections twice
    assert weights[8] - norms == (split + copies) // 8
    assert [pools[n] for n in (2, 4, 8)] == [pools[1] // 2, pools[1] // 4, pools[1] // 4]  # a head at least


def test_data_shards_have_pools_of_their_own_and_the_same_weights(checkpoint):
    one, two = (graph_of(checkpoint, tensor=2, data=data) for data in (1, 2))
    one_pool, two_pools = (graph.kv_cache_spec().abstract(NUM_BLOCKS, graph.mesh)[0][0] for graph in (one, two))
    assert two_pools.shape == (2 * NUM_BLOCKS, *one_pool.shape[1:])
    assert two_pools.sharding.shard_shape(two_pools.shape) == one_pool.sharding.shard_shape(one_pool.shape)
    assert bytes_of_a_device(iter(one.abstract_params().values())) == bytes_of_a_device(
        iter(two.abstract_params().values())
    )


class CountingCheckpoint:
    """A checkpoint that knows how much was read and not yet placed."""

    def __init__(self, checkpoint) -> None:
        self._checkpoint = checkpoint
        self.waiting: dict[str, int] = {}  # tensor -> bytes
        self.most_bytes = 0

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def read(self, name: str) -> np.ndarray:
        array = self._checkpoint.read(name)
        self.waiting[name] = array.nbytes
        self.most_bytes = max(self.most_bytes, sum(self.waiting.copy().values()))
        return array


def test_weights_stream_to_their_devices(checkpoint, monkeypatch):
    """While they load, no device holds more than its part, and the host no more than it reads ahead."""
    monkeypatch.setattr(mapping, "_READ_AHEAD_BYTES", 0)
    files = open_model(ModelSettings(model=str(checkpoint)))
    counting = CountingCheckpoint(files.checkpoint)
    object.__setattr__(files, "checkpoint", counting)
    graph = graph_of(checkpoint, tensor=4, data=2)
    rules = {rule.param: rule for rule in graph.weight_rules()}
    wanted = bytes_of_a_device(iter(graph.abstract_params().values()))
    before = {id(array) for array in jax.live_arrays()}
    held = []

    def on_progress(name: str, done: int, total: int) -> None:
        for source in rules[name].sources:
            counting.waiting.pop(source)
        by_device = dict.fromkeys(graph.mesh.devices.flat, 0)
        for array in jax.live_arrays():
            for device in array.devices() if id(array) not in before else ():
                by_device[device] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        held.append(by_device)

    params = load_weights(files, graph, on_progress)
    assert all(size <= wanted for by_device in held for size in by_device.values())
    assert set(held[-1].values()) == {wanted}
    largest = max(math.prod(rule.param_shape) * 4 for rule in rules.values())
    total = sum(array.nbytes for array in params.values())
    assert counting.most_bytes <= 2 * largest < total, "the parameter that is placed, and those read meanwhile"


@pytest.mark.parametrize("tensor", [3, 5, 6, 7])
def test_a_number_of_devices_that_cannot_share_the_model_is_refused_with_those_that_can(checkpoint, tensor):
    with pytest.raises(ConfigError, match=rf"size {tensor} does not fit.*\(8\).*\(128\).*\(4\).*work: 1, 2, 4, 8$"):
        graph_of(checkpoint, tensor=tensor)
