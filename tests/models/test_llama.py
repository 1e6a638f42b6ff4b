"""The Llama family's logits against transformers, for every spelling and option of its config."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ModelSettings
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.batch import BatchBuilder
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.loading import load_weights, open_model
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import ForwardBatch, forward
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import NewSlot, StepPlan
from tests.checkpoints import save_random_llama, transformers_logits

PROMPT = np.random.default_rng(0).integers(3, 320, 75).tolist()
BLOCK_SIZE = 16

VARIANTS = {
    "grouped heads": {},
    "multi-head": {"num_key_value_heads": 8},
    "one kv head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama 3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn scaling": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def logits_of(folder: Path, token_ids: list[int]) -> np.ndarray:
    """f32[tokens, vocab] of one step that computes the whole prompt."""
    files = open_model(ModelSettings(model=str(folder), dtype="float32"))
    backend = choose_backend(files.decoder, dtype=files.dtype, block_size=BLOCK_SIZE, mesh=make_mesh())
    graph = ModelGraph(files.decoder, dtype=files.dtype, backend=backend)
    params = load_weights(files, graph, lambda *_: None)
    spec = graph.kv_cache_spec()
    slots = SlotTable(max_num_seqs=2, max_blocks_per_seq=8)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    new = NewSlot(
        slot=1,
        request_id="r",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=SamplingParams(),
        stop_token_ids=[],
        block_ids=list(range(num_blocks, 0, -1)),
    )
    plan = StepPlan(
        step_id=0,
        new_slots=[new],
        request_ids=["r"],
        slots=[1],
        starts=[0],
        num_tokens=[len(token_ids)],
        samples=[True],
    )
    slots.apply(plan)
    batch = BatchBuilder(Buckets((128,), (2,)), slots, backend).build(plan).batches[0]
    tokens = jnp.zeros((3, 128), jnp.int32).at[1, : len(token_ids)].set(jnp.asarray(token_ids))
    caches = spec.allocate(num_blocks + 1, graph.mesh)

    @jax.jit
    def step(params, caches, tokens, batch):
        hidden, _, _, _ = forward(graph, params, caches, tokens, jnp.asarray(slots.block_tables), batch)
        return graph.bind(params).logits(hidden)

    return np.asarray(step(params, caches, tokens, ForwardBatch.from_host(batch)))[: len(token_ids)]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_llama_logits_agree_with_transformers(tmp_path: Path, changes: dict) -> None:
    folder = save_random_llama(tmp_path, **changes)
    wanted = transformers_logits(folder, PROMPT)
    given = logits_of(folder, PROMPT)
    assert np.max(np.abs(given - wanted)) / np.max(np.abs(wanted)) < 1e-4


@pytest.mark.parametrize("window", [None, 20])
def test_mistral_logits_agree_with_transformers(tmp_path: Path, window: int | None) -> None:
    folder = save_random_llama(tmp_path, "mistral", sliding_window=window)
    wanted = transformers_logits(folder, PROMPT)
    given = logits_of(folder, PROMPT)
    assert np.max(np.abs(given - wanted)) / np.max(np.abs(wanted)) < 1e-4
