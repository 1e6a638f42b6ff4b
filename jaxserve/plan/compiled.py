"""What the devices' own compilers say of a deployment's programs: memory, and what they send between devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jax.stages import Compiled, Lowered

from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.plan.deployment import Deployment, bytes_of_a_device
from jaxserve.plan.devices import Devices
from jaxserve.plan.hlo import collectives
from jaxserve.plan.memory import Memory, plan_memory
from jaxserve.plan.topologies import lowering_for, topology_mesh
from jaxserve.runner.program_arguments import ProgramArguments, sizes_of
from jaxserve.runner.programs import Programs

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """Bytes of one device, as XLA's memory analysis counts them."""

    memory: Memory  # with the compiler's step_bytes, and the pool that leaves
    weight_bytes: int  # of a decode step's and its sampler's arguments
    pool_bytes: int  # of a decode step's results that lie in its arguments
    collectives: Mapping[str, Mapping[str, int]]  # program -> kind of collective -> how many


def confirm(config: Config, devices: Devices, planned: Memory, tell: Tell) -> Confirmation:
    """Compile the largest step, the samplers and a decode step; `ConfigError` where memory does not suffice."""
    parallel = config.parallel
    mesh = topology_mesh(devices.kind.name, tensor=parallel.tensor_parallel_size, data=parallel.data_parallel_size)
    deployment = Deployment.of(config, devices, mesh=mesh)

    def compile_one(name: str, lower: Callable[[], Lowered]) -> Compiled:
        tell(f"compiling {name} for {devices}")
        with lowering_for(mesh):
            return lower().compile()

    def compile_jobs(jobs: Mapping[str, Callable[[], Lowered]]) -> dict[str, Compiled]:
        return {name: compile_one(f"the largest step, {name}", lower) for name, lower in jobs.items()}

    # The pool of the plan, for shapes alone: what a step takes beside it does not depend on its size.
    shapes = deployment.shapes(num_blocks=planned.num_blocks, max_model_len=planned.max_model_len)
    memory = plan_memory(deployment, step_bytes=Programs(deployment.graph, shapes).step_bytes(compile_jobs))

    shapes = deployment.shapes(num_blocks=memory.num_blocks, max_model_len=memory.max_model_len)
    programs, given = Programs(deployment.graph, shapes), ProgramArguments(deployment.graph, shapes)
    bucket = deployment.buckets.pick(min(deployment.settings.max_num_seqs, deployment.buckets.token_sizes[-1]))
    decode = compile_one(f"a decode step of {bucket.num_tokens}", lambda: programs.lower_forward(bucket))
    sampler = compile_one(
        f"a sampler of {bucket.num_rows} rows", lambda: programs.lower_sample(bucket.num_rows, "random")
    )
    forward, sample = sizes_of(decode), sizes_of(sampler)
    packed = given.split(1, given.forward_packings[bucket].size)
    weight_bytes = forward.argument_size_in_bytes - forward.alias_size_in_bytes
    weight_bytes -= bytes_of_a_device([given.tokens(), packed])
    if not deployment.graph.config.tie_embeddings:  # the head is the sampler's alone: the forward program takes none
        packed = given.split(1, given.sample_packings[bucket.num_rows].size)
        inputs = jax.tree.leaves(given.sampling_inputs(bucket.num_rows, "random"))
        weight_bytes += sample.argument_size_in_bytes - sample.alias_size_in_bytes
        weight_bytes -= bytes_of_a_device([given.hidden(bucket.num_rows), packed, *inputs])
    needed = weight_bytes + forward.alias_size_in_bytes + forward.temp_size_in_bytes
    if needed > memory.limit_bytes:
        raise ConfigError(
            f"a decode step takes {needed / 2**30:.1f} GiB as the compiler counts, the engine may have "
            f"{memory.limit_bytes / 2**30:.1f} GiB; lower gpu_memory_utilization or max_num_seqs"
        )
    return Confirmation(
        memory=memory,
        weight_bytes=weight_bytes,
        pool_bytes=forward.alias_size_in_bytes,
        collectives={
            "forward": collectives(decode.as_text() or ""),
            "sampler 'random'": collectives(sampler.as_text() or ""),
        },
    )
