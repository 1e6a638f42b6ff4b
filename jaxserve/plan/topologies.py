"""Devices that are not here, described to the real compilers: programs are compiled for them, and cannot run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import make_mesh

# As openxla describes it (xla/backends/gpu/target_config/specs/h100_sxm.txtpb), with the features of sm_90a.
_TARGET_CONFIGS = {
    "h100": """
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
}

# Chips of a slice -> its shape; a TPU topology is a host of at least four chips, and one chip is its first.
_TPU_SHAPES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}

COMPILED_KINDS = ("h100", "v5e", "v6e")
_DEVICES_OF_A_HOST = 8  # at most: of H100s with NVLink between them, of v5e and v6e chips in a slice of eight


def topology_mesh(kind: str, *, tensor: int, data: int = 1) -> Mesh:
    """A mesh of devices of one of `COMPILED_KINDS`, up to eight of them of one host; `ConfigError` where their compiler
    is not installed."""
    count = tensor * data
    if kind not in COMPILED_KINDS or count > max(_TPU_SHAPES):
        raise ConfigError(
            f"programs can be compiled for up to {max(_TPU_SHAPES)} devices of {', '.join(COMPILED_KINDS)}, not for "
            f"{kind}:{count}; plan without --compile"
        )
    is_gpu = kind in _TARGET_CONFIGS
    if is_gpu:
        of_a_host = count if count <= _DEVICES_OF_A_HOST else math.gcd(count, _DEVICES_OF_A_HOST)
        options = {"target_config": _TARGET_CONFIGS[kind], "topology": f"1x{count // of_a_host}x{of_a_host}"}
    else:
        chips, shape = next((chips, shape) for chips, shape in _TPU_SHAPES.items() if chips >= count)
        options: dict[str, Any] = {"topology_name": f"{kind}:{shape}"}
        if chips <= _DEVICES_OF_A_HOST:
            options["chips_per_host_bounds"] = [*map(int, shape.split("x")), 1]
    try:
        topology = topologies.get_topology_desc(platform="cuda" if is_gpu else "tpu", **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        wheels = "jax-cuda13-plugin and jax-cuda13-pjrt" if is_gpu else "libtpu"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"the compiler of {kind} is not available ({reason:.200}); install {wheels} (no device and no driver is "
            "needed), or plan without --compile"
        ) from error
    return make_mesh(tensor, data_parallel_size=data, devices=topology.devices)


@contextlib.contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
    """Kernels that ask what they are lowered for see the mesh's devices; without this they see the CPU."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield
