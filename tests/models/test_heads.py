"""Draft heads' logits against their references, at every position of a prompt, in every spelling of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxserve.config_speculative import Method
from jaxserve.engine.drafting import HeadParts, open_models
from jaxserve.models.head import DraftHead
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.batch import BatchBuilder
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.loading import load_weights, open_model
from jaxserve.runner.model_graph import choose_backend
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import ForwardBatch
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import NewSlot, StepPlan
from tests.checkpoints import save_random_llama
from tests.harness import tiny_config
from tests.models import test_llama
from tests.speculative.heads import (
    model_features,
    random_eagle3,
    save_eagle3,
    save_mimo,
    save_speculators,
    transformers_model,
)
from tests.speculative.reference_heads import Reference, causal

PROMPT = np.random.default_rng(0).integers(3, 320, 60).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model"))


def logits_of(model: Path, method: Method, head: Path | None, features: np.ndarray) -> np.ndarray:
    """f32[tokens - 1, vocab] of one pass over the prompt."""
    config = tiny_config(str(model), speculative_config={"method": method, "model": str(head) if head else None})
    target = open_model(config.model)
    mesh = make_mesh()
    backend = choose_backend(target.decoder, dtype=np.float32, block_size=16, mesh=mesh)
    model_parts, parts = open_models(config, target, backend, max_model_len=128)
    assert isinstance(parts, HeadParts)
    graph, model_graph = parts.graph, model_parts.graph
    params = parts.head.complete(
        load_weights(parts.files, graph, lambda *_: None),
        model_graph,
        load_weights(target, model_graph, lambda *_: None),
    )
    slots = SlotTable(max_num_seqs=2, max_blocks_per_seq=8)
    count = len(PROMPT) - 1
    new = NewSlot(
        slot=1,
        request_id="r",
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        sampling_params=SamplingParams(),
        stop_token_ids=[],
        block_ids=[4, 3, 2, 1],
    )
    plan = StepPlan(
        step_id=0, new_slots=[new], request_ids=["r"], slots=[1], starts=[0], num_tokens=[count], samples=[True]
    )
    slots.apply(plan)
    batch = BatchBuilder(Buckets((64,), (2,)), slots, graph.backend).build(plan).batches[0]
    inputs = ForwardBatch.from_host(batch).step_inputs(jnp.asarray(slots.block_tables))
    padding = 64 - count

    @jax.jit
    def step(params, caches, token_ids, features, inputs):
        bound: DraftHead = graph.bind(params)
        states, _ = bound.advance(token_ids, bound.combine(features), jnp.asarray(batch.positions), caches, inputs)
        return bound.logits(states)

    token_ids = np.pad(np.array(PROMPT[1:], np.int32), (0, padding))
    caches = graph.kv_cache_spec().allocate(5, mesh)
    return np.asarray(step(params, caches, token_ids, np.pad(features, ((0, padding), (0, 0))), inputs))[:count]


def check(given: np.ndarray, head: Reference, features: torch.Tensor) -> None:
    with torch.no_grad():
        states = head.advance(head.combine(features), torch.tensor(PROMPT[1:]), *causal(len(PROMPT) - 1))
        wanted = head.draft_logits(states).numpy()
        token_ids = head.to_model(torch.arange(wanted.shape[1])).numpy()
    assert np.max(np.abs(given[:, token_ids] - wanted)) / np.max(np.abs(wanted)) < 1e-4
    others = np.delete(given, token_ids, axis=1)
    assert np.all(others == -np.inf)


@pytest.mark.parametrize("changes", [{}, {"norm_before_residual": True}])
@pytest.mark.parametrize("save", [save_eagle3, save_speculators])
def test_eagle3_logits_agree_with_the_reference(model: Path, tmp_path: Path, save, changes: dict) -> None:
    head = random_eagle3(model, **changes)
    features = model_features(model, PROMPT)[:-1]
    given = logits_of(model, "eagle3", save(head, tmp_path / "head", **changes), features.numpy())
    assert given.shape == (59, 320)
    check(given, head, features)


def test_a_head_whose_attention_runs_elsewhere_reads_the_model_s_embedding(model: Path, tmp_path: Path) -> None:
    changes = {"head_dim": 8}  # for XLA, where the model's 16 may be for C++
    head = random_eagle3(model, **changes)
    features = model_features(model, PROMPT)[:-1]
    given = logits_of(model, "eagle3", save_eagle3(head, tmp_path / "head", **changes), features.numpy())
    check(given, head, features)


def test_a_head_over_the_whole_vocabulary_needs_no_token_map(model: Path, tmp_path: Path) -> None:
    head = random_eagle3(model, draft_vocab_size=320)
    del head.d2t, head.t2d
    head.to_model = lambda draft_ids: draft_ids
    features = model_features(model, PROMPT)[:-1]
    folder = save_eagle3(head, tmp_path / "head", draft_vocab_size=None)
    check(logits_of(model, "eagle3", folder, features.numpy()), head, features)


def test_mimo_logits_agree_with_the_reference(tmp_path: Path) -> None:
    model, head = save_mimo(tmp_path / "mimo")
    features = model_features(model, PROMPT, final=True)[:-1]
    check(logits_of(model, "mtp", None, features.numpy()), head, features)


def test_mimo_itself_is_qwen2_and_loads_without_its_head(tmp_path: Path) -> None:
    model, _ = save_mimo(tmp_path / "mimo")
    with torch.no_grad():
        wanted = transformers_model(model)(torch.tensor([PROMPT])).logits[0].numpy()
    given = test_llama.logits_of(model, PROMPT)
    assert np.max(np.abs(given - wanted)) / np.max(np.abs(wanted)) < 1e-4
