"""The kinds of device that a plan can be made for, by their makers' published figures."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import DATA, TENSOR


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """One kind of accelerator. Rates are peaks that no program reaches."""

    name: str
    platform: Literal["gpu", "tpu"]
    full_name: str
    memory_bytes: int  # that a program may have
    memory_bytes_per_s: float
    flops_per_s: float  # of dense products of 16-bit floats, accumulated in float32
    link_bytes_per_s: float  # that one device sends to its neighbours in the same server or pod
    num_cores: int
    compute_capability: str | None = None  # of an NVIDIA GPU


@dataclass(frozen=True, slots=True)
class _PlannedDevice(AbstractDevice):
    """An abstract device that says what kernels ask of a real one."""

    compute_capability: str | None


# NVIDIA's data sheets of the SXM boards (without sparsity; NVLink 3 and 4: 600 and 900 GB/s, half of it each way) and
# Google's pages on Cloud TPU (interconnect a chip: 1,600 and 3,584 Gbit/s).
KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind(
            name="a100",
            platform="gpu",
            full_name="NVIDIA A100-SXM4-80GB",
            memory_bytes=85_100_068_864,
            memory_bytes_per_s=2.039e12,
            flops_per_s=312e12,
            link_bytes_per_s=300e9,
            num_cores=108,
            compute_capability="8.0",
        ),
        DeviceKind(
            name="h100",
            platform="gpu",
            full_name="NVIDIA H100 80GB HBM3",
            memory_bytes=84_942_979_072,
            memory_bytes_per_s=3.35e12,
            flops_per_s=989e12,
            link_bytes_per_s=450e9,
            num_cores=132,
            compute_capability="9.0",
        ),
        DeviceKind(
            name="h200",
            platform="gpu",
            full_name="NVIDIA H200",
            memory_bytes=150_000_000_000,
            memory_bytes_per_s=4.8e12,
            flops_per_s=989e12,
            link_bytes_per_s=450e9,
            num_cores=132,
            compute_capability="9.0",
        ),
        DeviceKind(
            name="v5e",
            platform="tpu",
            full_name="TPU v5 lite",
            memory_bytes=16 * 2**30,
            memory_bytes_per_s=819e9,
            flops_per_s=197e12,
            link_bytes_per_s=200e9,
            num_cores=1,
        ),
        DeviceKind(
            name="v6e",
            platform="tpu",
            full_name="TPU v6 lite",
            memory_bytes=32 * 2**30,
            memory_bytes_per_s=1.64e12,
            flops_per_s=918e12,
            link_bytes_per_s=448e9,
            num_cores=1,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """A number of devices of one kind, none of which need be here."""

    kind: DeviceKind
    count: int

    @classmethod
    def parse(cls, text: str) -> Devices:
        """Read `h100:8`, or `h100` for one.

        >>> Devices.parse("v5e:4").count
        4
        """
        match = re.fullmatch(r"(\w+)(?::(\d+))?", text.strip().lower())
        if match is None or match[1] not in KINDS or (match[2] is not None and int(match[2]) < 1):
            near = difflib.get_close_matches(match[1] if match else text, KINDS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near and (match is None or near[0] != match[1]) else ""
            raise ConfigError(
                f"--devices must be a kind and a number from 1 on, such as h100:8, got {text!r}{hint} "
                f"(kinds: {', '.join(KINDS)})"
            )
        return cls(kind=KINDS[match[1]], count=int(match[2] or 1))

    def __str__(self) -> str:
        return f"{self.kind.name}:{self.count}"

    def abstract_mesh(self, *, tensor: int, data: int) -> AbstractMesh:
        """A mesh of so many of them, to ask for shapes and shardings; `ConfigError` where there are too few."""
        if tensor * data > self.count:
            raise ConfigError(
                f"tensor_parallel_size {tensor} and data_parallel_size {data} take {tensor * data} devices, "
                f"but --devices {self} has {self.count}"
            )
        device = _PlannedDevice(
            device_kind=self.kind.full_name,
            num_cores=self.kind.num_cores,
            platform=self.kind.platform,
            compute_capability=self.kind.compute_capability,
        )
        axis_types = (AxisType.Auto, AxisType.Auto)
        return AbstractMesh((data, tensor), (DATA, TENSOR), axis_types=axis_types, abstract_device=device)
