"""`Shards`: an array axis that lies in equal parts on several devices, as the code on one of them sees it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True, slots=True)
class Shards:
    """The devices of one mesh axis, each with its part of an array axis. For use inside a `jax.shard_map` over it.

    `WHOLE`, the default, is an axis in one piece: nothing is sent, and no `shard_map` is needed.
    """

    mesh_axis: str | None = None
    count: int = 1

    @property
    def index(self) -> jax.Array | int:
        """Which part is this device's."""
        return 0 if self.mesh_axis is None else lax.axis_index(self.mesh_axis)

    def sum(self, values: jax.Array) -> jax.Array:
        """The sum over the parts. One all-reduce."""
        return values if self.mesh_axis is None else lax.psum(values, self.mesh_axis)

    def gather(self, values: jax.Array, axis: int) -> jax.Array:
        """The parts side by side along `axis`, on every device. One all-gather."""
        return values if self.mesh_axis is None else lax.all_gather(values, self.mesh_axis, axis=axis, tiled=True)

    def from_owner(self, values: jax.Array, is_mine: jax.Array) -> jax.Array:
        """`values` of the one device where `is_mine` holds, entry by entry. One all-reduce."""
        return values if self.mesh_axis is None else self.sum(jnp.where(is_mine, values, 0))


WHOLE = Shards()
