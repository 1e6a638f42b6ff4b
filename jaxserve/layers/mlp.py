"""The gated feed-forward layer (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

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

    def __call__(
        self, x: Float[Array, "tokens hidden"], *, norm: RMSNorm, num_tokens: Int[Array, ""] | None = None
    ) -> Float[Array, "tokens hidden"]:
        """`x + mlp(norm(x))`; tokens from `num_tokens` on are padding."""
        gate_up = self.gate_up
        if gate_up.weight.shape[0] == 1 and gate_up.bias is None:
            weight = gate_up.weight[...][0]
            gated = gated_product(x, weight, self.numerics, norm=norm, num_tokens=num_tokens, panels=gate_up.panels)
        else:
            parts = gate_up(x, norm=norm, num_tokens=num_tokens)  # [tokens, shards, 2, ffn / shards]
            gated = jax.nn.silu(parts[:, :, 0]) * parts[:, :, 1]
        return self.down(gated.reshape(x.shape[0], -1), residual=x, num_tokens=num_tokens)
