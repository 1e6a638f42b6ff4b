"""What XLA makes of the sampler: nothing sorts the vocabulary, and little memory of its size is held."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.sampling.inputs import VARIANTS, abstract_inputs
from jaxserve.sampling.sampler import sample

pytestmark = pytest.mark.usefixtures("fused_as_served")

ROWS, VOCAB_SIZE = 4, 49152
LOGITS = jax.ShapeDtypeStruct((ROWS, VOCAB_SIZE), np.float32)


def largest_sorts(hlo: str) -> list[int]:
    """For each sort and each TopK, the longest axis among its operands (a TopK's result does not tell)."""
    shapes = dict(re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", hlo))
    found = []
    for line in hlo.splitlines():
        call = re.search(r"= .*?\b(?:sort|topk|custom-call)\(([^)]*)\)", line)
        if call and (" sort(" in line or " topk(" in line or "TopK" in line):
            operands = re.findall(r"%[\w.\-]+", call.group(1))
            found.append(max(int(n) for name in operands for n in shapes[name].split(",")))
    return found


def compiled_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    "function", [partial(lax.top_k, k=64), jnp.sort, jnp.argsort], ids=["top_k", "sort", "argsort"]
)
def test_a_sort_of_the_vocabulary_would_be_seen(function):
    assert VOCAB_SIZE in largest_sorts(compiled_text(function, LOGITS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiled_sampler_never_sorts_the_vocabulary(variant):
    def step(logits, inputs, history):
        return sample(logits, inputs, variant, history=history)

    history = jax.ShapeDtypeStruct((ROWS, 64), np.int32)
    inputs = abstract_inputs(ROWS, variant, vocab_size=VOCAB_SIZE)
    sizes = largest_sorts(compiled_text(step, LOGITS, inputs, history))
    assert bool(sizes) == (variant != "greedy")
    assert max(sizes, default=0) <= 64 * 128  # the blocks that hold the candidates


def test_drawing_holds_one_array_of_the_logits_size_beside_the_logits():
    def step(hidden, head, inputs):
        return sample(hidden @ head, inputs, "random")

    hidden = jax.ShapeDtypeStruct((ROWS, 8), np.float32)
    head = jax.ShapeDtypeStruct((8, VOCAB_SIZE), np.float32)
    inputs = abstract_inputs(ROWS, "random", vocab_size=VOCAB_SIZE)
    temporary_bytes = jax.jit(step).lower(hidden, head, inputs).compile().memory_analysis().temp_size_in_bytes
    assert temporary_bytes < 2.5 * ROWS * VOCAB_SIZE * 4
