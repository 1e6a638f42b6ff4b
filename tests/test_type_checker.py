"""The shapes in signatures are enforced in tests: what a wrong one meets, called at once or while tracing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

from jaxserve.layers.rope import RopeConfig, rotation
from jaxserve.runner.step import write_entries
from jaxserve.sampling.sampler import prompt_logprobs
from pallas_kernels.kv_write.rotation import rotate
from tests.type_checker import check

ROPE = RopeConfig(theta=1e4, head_dim=8)


def test_an_axis_too_many_is_refused():
    with pytest.raises(TypeCheckError, match="positions"):
        rotation(ROPE, jnp.zeros((2, 3), jnp.int32))


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="positions"):
        rotation(ROPE, jnp.zeros(3, jnp.float32))


@pytest.mark.parametrize("call", [prompt_logprobs, jax.jit(prompt_logprobs)], ids=["at once", "while tracing"])
def test_arguments_that_disagree_on_an_axis_are_refused(call):
    with pytest.raises(TypeCheckError, match="target_ids"):
        call(jnp.zeros((3, 40)), jnp.zeros(4, jnp.int32))


def test_a_wrong_answer_is_refused():
    @jaxtyped(typechecker=check)
    def transpose(x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
        return x.T

    transpose(jnp.zeros((2, 2)))
    with pytest.raises(TypeCheckError, match="return value"):
        transpose(jnp.zeros((2, 3)))


def test_a_function_without_shapes_is_left_alone():
    def count(tokens: list[int]) -> int:
        return len(tokens)

    assert check(count) is count


@pytest.mark.parametrize(
    "call",
    [
        lambda: write_entries(jnp.zeros((3, 8), jnp.int32), jnp.zeros((2, 4), jnp.int32)),
        lambda: rotate(jnp.zeros((5, 2, 8)), jnp.zeros((5, 8)), jnp.zeros((5, 8))),
    ],
    ids=["runner", "pallas_kernels"],
)
def test_every_package_with_shapes_is_checked(call):
    with pytest.raises(TypeCheckError):
        call()
