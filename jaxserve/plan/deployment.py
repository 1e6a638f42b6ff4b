"""`Deployment`: a launch config on given devices, as far as the engine would get before it touches one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.cache.kv_cache import KVCacheSpec
from jaxserve.config import Config
from jaxserve.engine.assembly import ModelParts, cache_spec
from jaxserve.engine.device import DeviceDefaults
from jaxserve.engine.drafting import open_models
from jaxserve.engine.startup import scheduler_settings, step_buckets
from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import AnyMesh
from jaxserve.plan.devices import Devices
from jaxserve.plan.models import planned_model
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.loading import ModelFiles
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.scheduler.settings import SchedulerSettings

_PLATFORM_OF_DEVICE = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the engine derives from a config, a model's shapes and a mesh."""

    config: Config
    devices: Devices
    models: tuple[ModelParts, ...]  # the one that answers, and what drafts for it
    settings: SchedulerSettings
    buckets: Buckets

    @classmethod
    def of(cls, config: Config, devices: Devices, *, mesh: AnyMesh | None = None) -> Deployment:
        """On an abstract mesh unless another is given; `ConfigError` or `CheckpointError` where the engine has them."""
        platform = devices.kind.platform
        asked = _PLATFORM_OF_DEVICE.get(config.runtime.device, platform)
        if asked != platform:
            raise ConfigError(f"the config's device is {config.runtime.device!r}, --devices {devices} is a {platform}")
        parallel = config.parallel
        mesh = mesh or devices.abstract_mesh(tensor=parallel.tensor_parallel_size, data=parallel.data_parallel_size)
        files = planned_model(config.model, platform)
        defaults = DeviceDefaults.of(platform)
        backend = choose_backend(
            files.decoder,
            dtype=files.dtype,
            block_size=config.cache.block_size or defaults.block_size,
            mesh=mesh,
            asked=None if config.runtime.attention_backend == "auto" else config.runtime.attention_backend,
        )
        settings = scheduler_settings(config, files, defaults)
        models = open_models(
            config.with_values(load_format="dummy"),  # config.json alone is read of a head
            files,
            backend,
            max_model_len=settings.max_model_len,
            open_draft=lambda draft: planned_model(draft, platform),
        )
        return cls(
            config=config,
            devices=devices,
            models=models,
            settings=settings,
            buckets=step_buckets(config, settings, models[0].graph.numerics),
        )

    @property
    def files(self) -> ModelFiles:
        """What is known of the model that answers."""
        return self.models[0].files

    @property
    def graph(self) -> ModelGraph:
        """The model that answers."""
        return self.models[0].graph

    @property
    def spec(self) -> KVCacheSpec:
        """The KV cache; a block counts the bytes of what drafts, too."""
        return cache_spec(self.models)

    @property
    def num_data_shards(self) -> int:
        """Copies of the model."""
        return self.config.parallel.data_parallel_size

    def shapes(self, *, num_blocks: int, max_model_len: int) -> ProgramShapes:
        """What the engine would compile for."""
        return ProgramShapes(
            buckets=self.buckets,
            kv_spec=self.spec,
            num_blocks=num_blocks,
            max_num_seqs=self.settings.max_num_seqs,
            max_num_drafts=self.settings.max_num_drafts,
            max_model_len=max_model_len,
        )

    def weight_bytes(self) -> int:
        """Of all parameters, on one device."""
        return sum(bytes_of_a_device(model.own_params().values()) for model in self.models)

    def pool_bytes(self, num_blocks: int) -> int:
        """Of all layers' K and V pools, on one device."""
        specs = (model.graph.kv_cache_spec() for model in self.models)
        return sum(bytes_of_a_device(jax.tree.leaves(spec.abstract(num_blocks, self.graph.mesh))) for spec in specs)

    def num_collectives(self) -> Mapping[str, Any]:
        """Times that devices exchange data: in the model's part of a step, and in the sampler's, by variant. What
        drafts comes on top.

        One sum for the embedding and two a layer. tests/parallel holds these numbers against compiled programs.
        """
        if self.graph.config.num_shards == 1:
            return {"forward": 0, "sampler": dict.fromkeys(SAMPLER_COLLECTIVES, 0)}
        return {"forward": 2 * self.graph.config.num_layers + 1, "sampler": dict(SAMPLER_COLLECTIVES)}


# Where the vocabulary is split. Greedy: each device's best. Random: that, the best few, and a round of drawing from
# all, with one for top_k above 64. Full: the best of raw and of ruled logits, the draws, and the log-probabilities.
SAMPLER_COLLECTIVES = {"greedy": 1, "random": 5, "full": 10}


def bytes_of_a_device(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """What one device holds of arrays with shardings."""
    return sum(elements_of_a_device(array) * array.dtype.itemsize for array in arrays)


def elements_of_a_device(array: jax.ShapeDtypeStruct) -> int:
    """How many of an array's values one device holds."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape))
