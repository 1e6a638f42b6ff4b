"""Runs the sampler on a vocabulary that is split over devices, the way the runner's step does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxserve.parallel.shards import Shards
from jaxserve.sampling.inputs import Variant
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.vocabulary import BLOCK_TOKENS

PADDING = 1e9  # what lies behind the vocabulary must not matter


@cache
def split_sampler(variant: Variant, num_shards: int) -> Callable:
    """`sample` of whole logits, each of `num_shards` devices working on its part."""
    mesh = Mesh(np.array(jax.devices()[:num_shards]), ("vocab",))

    def run(logits, inputs, history=None):
        size = logits.shape[1]
        padded = jnp.pad(logits, ((0, 0), (0, -size % (num_shards * BLOCK_TOKENS))), constant_values=PADDING)
        function = partial(sample, variant=variant, vocab_size=size, shards=Shards("vocab", num_shards))
        everywhere = PartitionSpec()
        return jax.shard_map(
            lambda logits, inputs, history: function(logits, inputs, history=history),
            mesh=mesh,
            in_specs=(PartitionSpec(None, "vocab"), everywhere, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )(padded, inputs, history)

    return jax.jit(run)
