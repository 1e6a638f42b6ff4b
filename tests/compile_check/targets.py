"""The devices that programs are compiled for, described to the real compilers: no GPU, TPU or driver is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.parallel.mesh import make_mesh

Device = Literal["h100", "v5e", "v6e"]

# As openxla describes it (xla/backends/gpu/target_config/specs/h100_sxm.txtpb), with the features of sm_90a.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A number of devices of one kind."""

    device: Device
    num_devices: int

    @property
    def name(self) -> str:
        """For the table: `h100`, `v5e-4`."""
        return self.device if self.num_devices == 1 else f"{self.device}-{self.num_devices}"

    @property
    def platform(self) -> Literal["cuda", "tpu"]:
        """The compiler's name for it."""
        return "cuda" if self.device == "h100" else "tpu"

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return {"h100": 84942979072, "v5e": 16 * 2**30, "v6e": 32 * 2**30}[self.device]

    def mesh(self) -> Mesh:
        """A mesh of devices that programs can be compiled for, and not run on."""
        if self.platform == "cuda":
            options = {"target_config": _H100, "topology": f"1x{self.num_devices}x1"}
        else:  # a TPU topology is a host of at least four chips: one chip is its first
            options = {"topology_name": f"{self.device}:{'2x4' if self.num_devices > 4 else '2x2'}"}
        topology = topologies.get_topology_desc(platform=self.platform, **options)
        return make_mesh(self.num_devices, devices=topology.devices)


@contextlib.contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
    """Kernels that ask what they are lowered for see the mesh's devices; without this they see the CPU."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield
