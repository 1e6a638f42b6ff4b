"""Where heads lie in the lanes of a TPU: pool shape, padded head sizes, queries in the lanes of their keys.

A TPU keeps arrays in tiles of 8 rows by 128 lanes. Pools are `[num_blocks, block_size, lanes]`: a slot is a row that
holds the K (or V) heads of its token side by side, two heads of 64 to a unit of 128 lanes:

    lanes    0..63     64..127   | 128..191  192..255        SmolLM2: 3 KV heads of 64
    holds    KV head 0 KV head 1 | KV head 2 nothing
             unit 0              | unit 1

What the TPU compiler (libtpu 0.0.42, for v5e) makes of bfloat16 pools, in bytes a token and pool. "transposed": as an
argument of a program it gets another order of dimensions than a kernel takes, so each call would copy the pool.

    KV heads, head_dim     values   [.., block_size, kv_heads, head_dim]    [.., block_size, lanes]
    8, 128 (8B)            2048     2048                                    2048
    2, 128 (8B on 4)       512      512                                     512
    1, 128 (70B on 8)      256      256, transposed                         256
    3, 64  (SmolLM2)       384      384, blocks in the lanes                512
    8, 64  (1B)            1024     1024, blocks in the lanes               1024

One row a token also means that a block is one contiguous copy, and that the keys of a head are whole tiles in VMEM:
with heads in the rows of tiles, each bfloat16 head would have to be picked out of packed pairs. The price is paid on
writing: a single row is not addressable, kv_write rewrites 8 rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

LANES = 128
SUBLANES = 8

POOL_HEAD_AXIS = 2  # of pool_shape: lanes of whole heads; each device of a mesh holds its own whole units


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """How the heads of one device share lanes. A unit is the smallest run of whole heads in whole 128 lanes."""

    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def padded_head_dim(self) -> int:
        """Lanes of a head."""
        return padded_head_dim(self.head_dim)

    @property
    def unit_kv_heads(self) -> int:
        """KV heads of a unit."""
        return max(1, LANES // self.padded_head_dim)

    @property
    def unit_lanes(self) -> int:
        """Lanes of a unit."""
        return max(LANES, self.padded_head_dim)

    @property
    def units(self) -> int:
        """Units of a slot."""
        return -(-self.kv_heads // self.unit_kv_heads)

    @property
    def lanes(self) -> int:
        """Lanes of a slot."""
        return self.units * self.unit_lanes

    @property
    def unit_q_heads(self) -> int:
        """Query heads that read a unit; the last unit may have fewer."""
        return self.unit_kv_heads * self.q_heads // self.kv_heads

    @property
    def q_rows(self) -> int:
        """Query heads, padded to whole tiles."""
        return -(-self.q_heads // SUBLANES) * SUBLANES

    def q_heads_of(self, unit: int) -> range:
        """Query heads that read a unit."""
        return range(unit * self.unit_q_heads, min(self.q_heads, (unit + 1) * self.unit_q_heads))


def padded_head_dim(head_dim: int) -> int:
    """Lanes that a head takes: a divisor of 128, or a multiple of it.

    >>> [padded_head_dim(d) for d in (64, 80, 96, 128, 256)]
    [64, 128, 128, 128, 256]
    """
    return head_dim if LANES % head_dim == 0 else -(-head_dim // LANES) * LANES


def pool_shape(num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Shape of one layer's K (or V) pool on one device, which holds `kv_heads` heads.

    >>> pool_shape(100, 128, 8, 128), pool_shape(100, 128, 3, 64)
    ((100, 128, 1024), (100, 128, 256))
    """
    return (num_blocks, block_size, HeadLayout(q_heads=kv_heads, kv_heads=kv_heads, head_dim=head_dim).lanes)


def keys_to_lanes(x: jax.Array, lanes: int) -> jax.Array:
    """[tokens, kv_heads, head_dim] -> [tokens, lanes], as slots hold them; unused lanes are zeros."""
    tokens, _, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padded_head_dim(head_dim) - head_dim))).reshape(tokens, -1)
    return jnp.pad(x, ((0, 0), (0, lanes - x.shape[1])))


def queries_to_lanes(q: jax.Array, layout: HeadLayout) -> jax.Array:
    """[tokens, q_heads, head_dim] -> [tokens, q_rows, unit_lanes]: each query in the lanes of its unit's KV head."""
    tokens = q.shape[0]
    q = jnp.pad(q, ((0, 0), (0, layout.q_rows - layout.q_heads), (0, layout.padded_head_dim - layout.head_dim)))
    if layout.unit_kv_heads > 1:
        q = jnp.where(_own_lanes(layout), q[:, :, None, :], 0)
    return q.reshape(tokens, layout.q_rows, layout.unit_lanes)


def results_from_lanes(out: jax.Array, layout: HeadLayout) -> jax.Array:
    """[tokens, q_rows, unit_lanes] -> [tokens, q_heads, head_dim]: undoes `queries_to_lanes`."""
    tokens = out.shape[0]
    if layout.unit_kv_heads > 1:
        out = out.reshape(tokens, layout.q_rows, layout.unit_kv_heads, layout.padded_head_dim)
        out = jnp.where(_own_lanes(layout), out, 0).sum(2, dtype=out.dtype)
    return out[:, : layout.q_heads, : layout.head_dim]


def _own_lanes(layout: HeadLayout) -> jax.Array:
    """bool[1, q_rows, unit_kv_heads, 1]: the KV head of each query head, within its unit."""
    kv_head = jnp.arange(layout.q_rows) * layout.kv_heads // layout.q_heads % layout.unit_kv_heads
    return (kv_head[:, None] == jnp.arange(layout.unit_kv_heads))[None, :, :, None]
