"""merge_partials: parts of a softmax put together, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.numerics import MASKED
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import DecodePlan, rows_per_token
from pallas_kernels.paged_attention.mosaic_gpu.merge import Partials, merge_partials
from tests.kernels import interpreted

pytest_plugins = ("tests.kernels.gpu_interpreter",)
pytestmark = pytest.mark.usefixtures("compiled_once", "few_reads_at_once")

KV_HEADS, HEAD_DIM, NUM_PARTIALS, NUM_TOKENS = 2, 8, 7, 12


def make_plan(merges, tokens_per_tile) -> DecodePlan:
    padded = np.zeros((4, 4), np.int32)
    padded[: len(merges)] = np.reshape(merges, (-1, 4))
    return DecodePlan(
        items=np.zeros((0, 8), np.int32),
        merges=padded,
        tokens_per_tile=tokens_per_tile,
        num_partials=NUM_PARTIALS,
        num_sms=1,
    )


def split_softmax(plan, group, rng, *, blind=()):
    """Partials of random scores and values, NaN where no item would write, and the softmax of all in float64.

    `blind` partials see no key: they hold nonsense, of the mask's weight.
    """
    token_rows = rows_per_token(group)
    shape = (NUM_PARTIALS, KV_HEADS, plan.tokens_per_tile * token_rows)
    out, log_weight = np.full((*shape, HEAD_DIM), np.nan), np.full(shape, np.nan)
    expected = {}
    for token, num_tokens, first, count in plan.merges:
        for index in range(num_tokens):
            for head in range(KV_HEADS * group):
                place = head // group, index * token_rows + head % group
                parts = [(rng.normal(size=9) * 4, rng.normal(size=(9, HEAD_DIM))) for _ in range(count)]
                for part, (scores, values) in enumerate(parts):
                    weights = np.exp(scores)
                    where = (first + part, *place)
                    out[where] = weights @ values / weights.sum()
                    log_weight[where] = MASKED if part in blind else np.log2(weights.sum())
                seen = [part for index, part in enumerate(parts) if index not in blind]
                expected[token + index, head] = [np.concatenate(x) for x in zip(*seen, strict=True)]
    return Partials(*(jnp.asarray(x, jnp.float32) for x in (out, log_weight))), expected


def merged(before, partials, plan, sinks=None):
    merge = jax.jit(partial(merge_partials, interpret=interpreted.gpu()))
    return np.asarray(merge(jnp.asarray(before), partials, plan, sinks))


def softmax(scores, values, sink):
    weights = np.exp(scores)
    return weights @ values / (weights.sum() + (0.0 if sink is None else np.exp(sink)))


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("group", "tokens_per_tile"), [(1, 1), (5, 8), (16, 4)])
def test_parts_give_the_softmax_of_the_whole(group, tokens_per_tile, has_sinks):
    rng = np.random.default_rng(0)
    plan = make_plan([(2, 1, 0, 5), (4, min(3, tokens_per_tile), 5, 2)], tokens_per_tile)
    partials, expected = split_softmax(plan, group, rng)
    sinks = rng.normal(size=KV_HEADS * group) * 3 if has_sinks else None
    before = np.full((NUM_TOKENS, KV_HEADS * group, HEAD_DIM), 7.0, np.float32)
    given = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    out = merged(before, partials, plan, given)
    for (token, head), (scores, values) in expected.items():
        wanted = softmax(scores, values, None if sinks is None else sinks[head])
        np.testing.assert_allclose(out[token, head], wanted, rtol=1e-5, atol=1e-5)
    others = sorted(set(range(NUM_TOKENS)) - {token for token, _ in expected})
    assert (out[others] == 7.0).all()


def test_a_part_in_which_every_key_was_masked_has_no_weight():
    plan = make_plan([(0, 1, 0, 3)], 1)
    partials, expected = split_softmax(plan, 4, np.random.default_rng(0), blind=(1,))
    out = merged(np.zeros((NUM_TOKENS, 8, HEAD_DIM), np.float32), partials, plan)
    for (token, head), (scores, values) in expected.items():
        np.testing.assert_allclose(out[token, head], softmax(scores, values, None), rtol=1e-5, atol=1e-5)


def test_without_merges_nothing_changes():
    plan = make_plan([], 1)
    partials, _ = split_softmax(plan, 4, np.random.default_rng(0))
    before = jnp.ones((NUM_TOKENS, 8, HEAD_DIM), jnp.bfloat16)
    assert (merged(before, partials, plan) == before).all()
