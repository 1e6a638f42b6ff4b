"""Linear layers, the token embedding and the language-model head; weights are stored [out, in]."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.parameter import parameter
from pallas_kernels.matmul import matmul, panel_rows


def product(
    x: Float[Array, "tokens in_features"],
    weight: Float[Array, "... in_features"],
    numerics: Numerics,
    out_dtype: DTypeLike,
    *,
    norm: RMSNorm | None = None,
    residual: Float[Array, "tokens hidden"] | None = None,
    num_tokens: Int[Array, ""] | None = None,
    panels: bool = False,
) -> Float[Array, "tokens ..."]:
    """`norm(x) @ weight.T + residual` over the last axis of x and weight, accumulated in float32.

    Rows from `num_tokens` on are padding, which need not be computed.
    The weight is flattened to two axes first: of a product with more, XLA:CPU makes a transposed copy at every step.
    """
    y = matmul(
        x,
        weight.reshape(-1, weight.shape[-1]),
        out_dtype=out_dtype,
        implementation=numerics.products,
        residual=residual,
        num_tokens=num_tokens,
        panels=panels,
        **_norm_settings(norm),
    )
    return y.reshape(x.shape[0], *weight.shape[:-1])


def gated_product(
    x: Float[Array, "tokens in_features"],
    weight: Float[Array, "2 out_features in_features"],
    numerics: Numerics,
    *,
    norm: RMSNorm | None = None,
    num_tokens: Int[Array, ""] | None = None,
    panels: bool = False,
) -> Float[Array, "tokens out_features"]:
    """`silu(norm(x) @ weight[0].T) * (norm(x) @ weight[1].T)`."""
    return matmul(
        x,
        weight,
        out_dtype=numerics.gated,
        implementation=numerics.products,
        num_tokens=num_tokens,
        panels=panels,
        **_norm_settings(norm),
    )


def _norm_settings(norm: RMSNorm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm": norm.weight[...], "epsilon": norm.epsilon}


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`. `out_shape` may have several axes, so that fused projections keep their parts apart;
    of these only the first may be split over the mesh."""

    def __init__(
        self,
        in_features: int,
        out_shape: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        numerics: Numerics,
        bias: bool = False,
        matrix_axes: int | None = None,
    ) -> None:
        """`matrix_axes`: how many last axes of the weight one product takes, where not all of them."""
        self.panels = numerics.takes_panels(in_features)
        panels = (matrix_axes or len(axes)) if self.panels else None
        self.weight = parameter((*out_shape, in_features), axes, numerics.weights, matrix_axes=panels)
        self.bias = parameter(out_shape, axes[:-1], numerics.weights) if bias else None
        self.numerics = numerics

    def __call__(
        self,
        x: Float[Array, "tokens in_features"],
        *,
        norm: RMSNorm | None = None,
        residual: Float[Array, "tokens hidden"] | None = None,
        num_tokens: Int[Array, ""] | None = None,
    ) -> Float[Array, "tokens ..."]:
        """`norm` is applied to x first, `residual` added last: fused with the product where its kernel can."""
        numerics = self.numerics
        y = product(
            x,
            self.weight[...],
            numerics,
            numerics.activations,
            norm=norm,
            residual=residual,
            num_tokens=num_tokens,
            panels=self.panels,
        )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """Token vectors; the same weight serves as the head of models with tied embeddings, and lies as a head's does."""

    def __init__(self, vocab_size: int, hidden_size: int, *, numerics: Numerics) -> None:
        self.panels = numerics.takes_panels(hidden_size) and vocab_size * hidden_size < 2**31  # see `panel_rows`
        matrix_axes = 2 if self.panels else None
        self.weight = parameter((vocab_size, hidden_size), ("vocab", None), numerics.weights, matrix_axes=matrix_axes)
        self.numerics = numerics

    def __call__(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        weight, numerics = self.weight[...], self.numerics
        vectors = panel_rows(weight, token_ids, numerics.panel_columns) if self.panels else weight[token_ids]
        return vectors.astype(numerics.activations)

    def logits(
        self, hidden: Float[Array, "rows hidden"], num_rows: Int[Array, ""] | None = None
    ) -> Float[Array, "rows vocab"]:
        """Unnormalised scores over the vocabulary, float32; rows from `num_rows` on are padding."""
        weight = self.weight[...]
        return product(hidden, weight, self.numerics, jnp.float32, num_tokens=num_rows, panels=self.panels)
