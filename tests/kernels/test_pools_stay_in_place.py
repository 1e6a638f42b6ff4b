"""A step with donated pools copies no pool: read off the compiled programs of several layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write
from pallas_kernels.numerics import pool_dtype, pool_shape
from pallas_kernels.paged_attention import AttentionGeometry, metadata_shapes, paged_attention

pytestmark = pytest.mark.usefixtures("fused_as_served")

NUM_BLOCKS = 2039  # a prime, so that no other array has the size of a pool
NUM_LAYERS = 3
SHAPE = pool_shape(NUM_BLOCKS, 16, 2, 64)
# Instructions that only rename or pass on a buffer.
FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "while"}


def step(q, pools, slots, metadata):
    written = []
    for k_pool, v_pool in pools:
        k_pool, v_pool = kv_write(q[:, :2], q[:, 2:4], k_pool, v_pool, slots)
        q = paged_attention(q, k_pool, v_pool, metadata, scale=0.125)
        written.append((k_pool, v_pool))
    return q, written


def compile_step(num_tokens: int, dtype: str, has_prefill: bool):
    pool = jax.ShapeDtypeStruct(SHAPE, pool_dtype(dtype, "cpu"))
    q = jax.ShapeDtypeStruct((num_tokens, 4, 64), jnp.dtype(dtype))
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    geometry = AttentionGeometry(q_heads=4, kv_heads=2, head_dim=64, block_size=16, dtype=dtype)
    metadata = metadata_shapes(
        geometry=geometry,
        num_tokens=num_tokens,
        num_rows=min(num_tokens, 8),
        blocks_per_seq=32,
        has_prefill=has_prefill,
    )
    pools = [(pool, pool)] * NUM_LAYERS
    return jax.jit(step, donate_argnums=1).lower(q, pools, slots, metadata).compile()


def pool_sized_instructions(hlo: str, shape: tuple[int, ...] = SHAPE) -> list[str]:
    """Opcodes of instructions whose result is as large as a pool, fusions by the names of what they hold."""
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(?)\w+\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        if match and not match[1] and np.prod([int(n) for n in match[2].split(",") if n] or [1]) == np.prod(shape):
            found.append(match[3])
    return [opcode for opcode in found if opcode not in FREE]


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "has_prefill"),
    [
        (1, "bfloat16", True),
        (8, "bfloat16", False),
        (128, "bfloat16", True),
        (1, "float32", True),
        (16, "float16", True),
    ],
)
def test_no_instruction_but_the_writes_makes_a_pool(num_tokens, dtype, has_prefill):
    compiled = compile_step(num_tokens, dtype, has_prefill)
    opcodes = pool_sized_instructions(compiled.as_text())
    assert set(opcodes) <= {"scatter", "fusion", "call", "dynamic-update-slice"}
    # A fusion and what it holds count once each; without copies nothing else is of this size.
    pool_bytes = int(np.prod(SHAPE)) * pool_dtype(dtype, "cpu").itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * NUM_LAYERS * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes


def test_a_pool_that_is_copied_is_noticed():
    def copies(pool, slots):
        return pool, pool.at[slots].set(1)

    pool, slots = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    compiled = jax.jit(copies, donate_argnums=0).lower(pool, slots).compile()
    assert "copy" in pool_sized_instructions(compiled.as_text())
