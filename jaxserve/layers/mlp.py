"""The gated feed-forward layer (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.layers.linear import Linear, gated_product
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.numerics import Numerics


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` of the normalised residual stream, which it is added to.

    Gate and up are one product, laid out so that the mesh splits both alike.

    # gate_up.weight [shards, 2, ffn / shards, hidden]: each shard holds its share of gate, then of up
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, *, numerics: Numerics, num_shards: int = 1, bias: bool = False
    ) -> None:
        self.gate_up = Linear(
            hidden_size,
            (num_shards, 2, ffn_size // num_shards),
            axes=("shards", None, None, None),
            numerics=numerics,
            bias=bias,
            matrix_axes=None if bias or num_shards > 1 else 2,
        )
        self.numerics = numerics
        self.down = Linear(ffn_size, (hidden_size,), axes=(None, "ffn"), numerics=numerics, bias=bias)

    def __call__(self, x: Float[Array, "tokens hidden"], *, norm: RMSNorm) -> Float[Array, "tokens hidden"]:
        """`x + mlp(norm(x))`."""
        if self.gate_up.weight.shape[0] == 1 and self.gate_up.bias is None:
            gated = gated_product(x, self.gate_up.weight[...][0], self.numerics, norm=norm, panels=self.gate_up.panels)
        else:
            gate_up = self.gate_up(x, norm=norm)  # [tokens, shards, 2, ffn / shards]
            gated = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return self.down(gated.reshape(x.shape[0], -1), residual=x)
