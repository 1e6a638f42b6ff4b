"""What a compile check is: a program, the devices it is compiled for, and what its compiled form must keep to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh
from jax.stages import Lowered

from tests.compile_check.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is held against a compiled program; None: nothing to hold it to. Sizes are those of one device."""

    pool_elements: int | None = None  # no instruction but a kernel may make an array of this size
    min_alias_bytes: int = 0  # of results that must lie in donated arguments: all pools
    max_temp_bytes: int | None = None  # of temporaries: what the step's activations may take
    vocab_size: int | None = None  # of the model: no sort along that axis, whole or a device's share
    num_shards: int = 1  # devices that the vocabulary is split over
    max_collectives: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program to compile. `expected` is set for programs made to fail: what the failure must say."""

    name: str
    target: Target
    lower: Callable[[Mesh], Lowered]
    limits: Limits = Limits()
    has_kernels: bool = True  # hand-written ones: a GPU's must leave a report of registers and spills
    layers: int | None = None
    expected: str | None = None


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of a job, as it is printed and written: bytes are those of one device."""

    name: str
    target: str
    jax: str
    layers: int | None = None
    compile_s: float | None = None
    registers: int | None = None  # a thread, of the kernel that takes most
    spill_bytes: int | None = None
    shared_bytes: int | None = None  # shared memory a block (GPU), of the kernel that takes most
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    flops: float | None = None  # as XLA counts them, without what hand-written kernels do unless they say so
    accessed_bytes: float | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    date: str | None = None  # ISO, of the day it was compiled, once it is on record

    @classmethod
    def of(cls, job: Job, jax_version: str, **values: Any) -> Result:
        """A result of `job`, not measured yet."""
        return cls(name=job.name, target=job.target.name, jax=jax_version, layers=job.layers, **values)
