"""What the devices' own compilers say of a deployment's programs: memory, and what they send between devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from jaxserve.config import Config
from jaxserve.engine.assembly import ModelParts
from jaxserve.errors import ConfigError
from jaxserve.plan.deployment import Deployment, bytes_of_a_device
from jaxserve.plan.devices import Devices
from jaxserve.plan.hlo import collectives
from jaxserve.plan.memory import Memory, plan_memory
from jaxserve.plan.topologies import lowering_for, topology_mesh
from jaxserve.runner.program import Program
from jaxserve.runner.program_arguments import sizes_of

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """Bytes of one device, as XLA's memory analysis counts them; of the model and of what drafts for it."""

    memory: Memory  # with the compiler's step_bytes, and the pool that leaves
    weight_bytes: int  # of a decode step's and its sampler's arguments
    pool_bytes: int  # of a decode step's results that lie in its arguments
    collectives: Mapping[str, Mapping[str, int]]  # program -> kind of collective -> how many


def confirm(config: Config, devices: Devices, planned: Memory, tell: Tell) -> Confirmation:
    """Compile the largest step, the samplers and a decode step; `ConfigError` where memory does not suffice."""
    parallel = config.parallel
    mesh = topology_mesh(devices.kind.name, tensor=parallel.tensor_parallel_size, data=parallel.data_parallel_size)
    deployment = Deployment.of(config, devices, mesh=mesh)

    def compile_one(name: str, lower: Callable[[], Lowered]) -> _Counted:
        tell(f"compiling {name} for {devices}")
        with lowering_for(mesh):
            lowered = lower()
            return _Counted(lowered, lowered.compile())

    def compile_jobs(jobs: Mapping[str, Program]) -> dict[str, Compiled]:
        return {name: compile_one(f"the largest step, {name}", job.lower).compiled for name, job in jobs.items()}

    # The pool of the plan, for shapes alone: what a step takes beside it does not depend on its size.
    shapes = deployment.shapes(num_blocks=planned.num_blocks, max_model_len=planned.max_model_len)
    step_bytes = sum(model.programs(shapes).step_bytes(compile_jobs) for model in deployment.models)
    memory = plan_memory(deployment, step_bytes=step_bytes)

    shapes = deployment.shapes(num_blocks=memory.num_blocks, max_model_len=memory.max_model_len)
    bucket = deployment.buckets.pick(min(deployment.settings.max_num_seqs, deployment.buckets.token_sizes[-1]))
    weight_bytes = pool_bytes = temp_bytes = 0
    found: dict[str, Mapping[str, int]] = {}
    for model, whose in zip(deployment.models, ("", "draft "), strict=False):
        programs = model.programs(shapes)
        step = compile_one(f"a {whose}decode step of {bucket.num_tokens}", partial(programs.lower_forward, bucket))
        sampler = compile_one(
            f"a {whose}sampler of {bucket.num_rows} rows", partial(programs.lower_sample, bucket.num_rows, "random")
        )
        weight_bytes += step.parameter_bytes + sampler.parameter_bytes - _counted_elsewhere(model)
        pool_bytes += step.pool_bytes
        temp_bytes = max(temp_bytes, step.sizes.temp_size_in_bytes)
        found |= {f"{whose}forward": step.collectives, f"{whose}sampler 'random'": sampler.collectives}
    needed = weight_bytes + pool_bytes + temp_bytes
    if needed > memory.limit_bytes:
        raise ConfigError(
            f"a decode step takes {needed / 2**30:.1f} GiB as the compiler counts, the engine may have "
            f"{memory.limit_bytes / 2**30:.1f} GiB; lower gpu_memory_utilization or max_num_seqs"
        )
    return Confirmation(memory=memory, weight_bytes=weight_bytes, pool_bytes=pool_bytes, collectives=found)


def _counted_elsewhere(model: ModelParts) -> int:
    """Of a model's parameters, an embedding that is its head as well, and what it shares with the model before it."""
    params, own = model.graph.abstract_params(), model.own_params()
    twice = [params[name] for name in model.graph.head_names() if name.startswith("embedding.")]
    shared = [value for name, value in params.items() if name not in own]
    return bytes_of_a_device([*twice, *shared])


@dataclass(frozen=True, slots=True)
class _Counted:
    """A program whose first argument are parameters, and whose second one, of a pass, KV pools."""

    lowered: Lowered
    compiled: Compiled

    @property
    def sizes(self) -> Any:
        """The compiler's count."""
        return sizes_of(self.compiled)

    @property
    def parameter_bytes(self) -> int:
        """All arguments without those that results lie in, and without small ones."""
        kept = self.sizes.argument_size_in_bytes - self.sizes.alias_size_in_bytes
        return kept - self._bytes_of_others(donated=False, first=1)

    @property
    def pool_bytes(self) -> int:
        """Results that lie in arguments."""
        return self.sizes.alias_size_in_bytes - self._bytes_of_others(donated=True, first=2)

    @property
    def collectives(self) -> Mapping[str, int]:
        """Kind -> how many."""
        return collectives(self.compiled.as_text() or "")

    def _bytes_of_others(self, *, donated: bool, first: int) -> int:
        """Of arguments from a place on, on one device."""
        infos = jax.tree.leaves(self.lowered.args_info[0][first:])
        shardings = jax.tree.leaves(self.compiled.input_shardings[0][first:])
        return bytes_of_a_device(
            jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
            for info, sharding in zip(infos, shardings, strict=True)
            if info.donated == donated
        )
