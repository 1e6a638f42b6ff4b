"""What one TPU attention kernel is compiled for, and what that takes of the chip: VMEM, operations, bytes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.mosaic_tpu.layout import LANES, HeadLayout
from pallas_kernels.paged_attention.mosaic_tpu.tiles import Tiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Static arguments of a kernel."""

    layout: HeadLayout
    tiles: Tiles
    block_size: int
    dtype: str  # of queries, pools and results
    blocks_per_seq: int = 1  # width of the block tables
    scale: float = 1.0
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def is_decode(self) -> bool:
        """One token an item, all heads in one product."""
        return self.tiles.query_tile == 1

    @property
    def tile_blocks(self) -> int:
        """Blocks of a tile of keys."""
        return self.tiles.kv_tile // self.block_size

    @property
    def table_parts(self) -> int:
        """Parts of the block tables, of LANES entries, that hold a tile's blocks, wherever the first of them is."""
        return -(-(self.tile_blocks - 1) // LANES) + 1

    @property
    def groups(self) -> int:
        """Matrix products that the heads are split into."""
        return 1 if self.is_decode else self.layout.units

    @property
    def groups_at_once(self) -> int:
        """Groups that one turn of the loop computes: the softmax of one overlaps the products of the other.

        All of them would be faster to run by a little and slower to compile by as much as there are more.
        """
        return 2 if self.groups % 2 == 0 else 1

    @property
    def group_rows(self) -> int:
        """Rows of a product."""
        return self.layout.q_rows if self.is_decode else self.layout.unit_q_heads * self.tiles.query_tile

    @property
    def group_lanes(self) -> int:
        """Lanes of a product."""
        return self.layout.lanes if self.is_decode else self.layout.unit_lanes


def scratch_shapes(settings: Settings) -> dict[str, Any]:
    """The kernel's scratch in VMEM by name, as its `_Kernel` describes it."""
    layout, tiles, dtype = settings.layout, settings.tiles, jnp.dtype(settings.dtype)
    tokens = (tiles.query_tile, layout.q_rows, layout.unit_lanes)
    keys = (2, tiles.kv_tile, layout.lanes)
    group = (settings.groups, settings.group_rows)
    scratch = {
        "q_buffer": pltpu.VMEM((2, *tokens), dtype),
        "k_buffer": pltpu.VMEM(keys, dtype),
        "v_buffer": pltpu.VMEM(keys, dtype),
        "out_buffer": pltpu.VMEM((2, *tokens), dtype),
        "queries": pltpu.VMEM((*group, settings.group_lanes), dtype),
        "top": pltpu.VMEM((*group, LANES), jnp.float32),
        "total": pltpu.VMEM((*group, LANES), jnp.float32),
        "weighted": pltpu.VMEM((*group, settings.group_lanes), jnp.float32),
    }
    return scratch if settings.is_decode else {**scratch, "heads": pltpu.VMEM(tokens, jnp.float32)}


def vmem_bytes(settings: Settings) -> int:
    """VMEM that the kernel asks for: its scratch, and room for the scores of one product and for copies of them."""
    scratch = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch_shapes(settings).values())
    scores = settings.group_rows * settings.tiles.kv_chunk * 4
    return scratch + 6 * scores + (8 << 20)


def cost(settings: Settings, *, num_items: int, num_tokens: int) -> pl.CostEstimate:
    """An upper bound, since lengths are known only at run time: each item sees its whole block table."""
    layout, itemsize = settings.layout, jnp.dtype(settings.dtype).itemsize
    keys = settings.blocks_per_seq * settings.block_size
    queries = num_items if settings.is_decode else num_tokens
    scores = queries * layout.q_heads * keys
    return pl.CostEstimate(
        flops=4 * scores * layout.head_dim,
        transcendentals=scores * (1 if settings.soft_cap is None else 2),
        bytes_accessed=2 * itemsize * (queries * layout.q_rows * layout.unit_lanes + num_items * keys * layout.lanes),
    )
