"""Linear layers, the token embedding and the language-model head; weights are stored [out, in]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.layers.numerics import Numerics
from pallas_kernels.matmul import matmul


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> nnx.Param:
    """A parameter without a value: its shape, dtype and logical axes, filled when the checkpoint is read."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


def product(
    x: Float[Array, "tokens in_features"],
    weight: Float[Array, "... in_features"],
    numerics: Numerics,
    out_dtype: DTypeLike,
) -> Float[Array, "tokens ..."]:
    """`x @ weight.T` over the last axis of both, accumulated in float32.

    The weight is flattened to two axes first: of a product with more, XLA:CPU makes a transposed copy at every step.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    y = matmul(x, flat, out_dtype=out_dtype, implementation=numerics.products)
    return y.reshape(x.shape[0], *weight.shape[:-1])


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
    ) -> None:
        self.weight = parameter((*out_shape, in_features), axes, numerics.weights)
        self.bias = parameter(out_shape, axes[:-1], numerics.weights) if bias else None
        self.numerics = numerics

    def __call__(self, x: Float[Array, "tokens in_features"]) -> Float[Array, "tokens ..."]:
        y = product(x, self.weight[...], self.numerics, self.numerics.activations)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """Token vectors; the same weight serves as the head of models with tied embeddings."""

    def __init__(self, vocab_size: int, hidden_size: int, *, numerics: Numerics) -> None:
        self.weight = parameter((vocab_size, hidden_size), ("vocab", None), numerics.weights)
        self.numerics = numerics

    def __call__(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        return self.weight[...][token_ids].astype(self.numerics.activations)

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float[Array, "rows vocab"]:
        """Unnormalised scores over the vocabulary, float32."""
        return product(hidden, self.weight[...], self.numerics, jnp.float32)
