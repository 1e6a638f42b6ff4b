"""The devices that programs are compiled for: no GPU, TPU or driver is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

from jaxserve.plan.devices import KINDS, DeviceKind
from jaxserve.plan.topologies import topology_mesh

Device = Literal["h100", "v5e", "v6e"]

DEVICES: dict[Device, DeviceKind] = {"h100": KINDS["h100"], "v5e": KINDS["v5e"], "v6e": KINDS["v6e"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A number of devices of one kind, in so many data shards."""

    device: Device
    num_devices: int
    num_data_shards: int = 1

    @property
    def name(self) -> str:
        """For the table: `h100`, `v5e-4`, and `v5e-2x4` for two data shards of four devices."""
        if self.num_data_shards > 1:
            return f"{self.device}-{self.num_data_shards}x{self.tensor_size}"
        return self.device if self.num_devices == 1 else f"{self.device}-{self.num_devices}"

    @property
    def tensor_size(self) -> int:
        """Devices that share each layer."""
        return self.num_devices // self.num_data_shards

    @property
    def platform(self) -> Literal["cuda", "tpu"]:
        """The compiler's name for it."""
        return "tpu" if DEVICES[self.device].platform == "tpu" else "cuda"

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return DEVICES[self.device].memory_bytes

    @staticmethod
    def device_of(name: str) -> Device:
        """The kind of device of a target's name.

        >>> Target.device_of("v5e-2x4"), Target.device_of("h100")
        ('v5e', 'h100')
        """
        return next(device for device in DEVICES if device == name.partition("-")[0])

    def mesh(self) -> Mesh:
        """A mesh of devices that programs can be compiled for, and not run on."""
        return topology_mesh(self.device, tensor=self.tensor_size, data=self.num_data_shards)
