"""The one place that hides differences between JAX versions."""

import importlib
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_pytree_dataclass(cls: type[T], data_fields: tuple[str, ...]) -> type[T]:
    """Registers a frozen dataclass whose fields are all arrays.

    Every supported version takes explicit field lists; only the newer ones can find the fields by themselves.
    """
    return jax.tree_util.register_dataclass(cls, data_fields=list(data_fields), meta_fields=[])


def gpu_interpret_params(**options: Any) -> Any:
    """`InterpretGPUParams`, which runs a Mosaic GPU kernel on the CPU; public since 0.11."""
    public = jax.__version_info__ >= (0, 11)
    module = "jax.experimental.pallas.mosaic_gpu" if public else "jax._src.pallas.mosaic_gpu.interpret.params"
    return importlib.import_module(module).InterpretGPUParams(**options)


def gpu_interpreter_models_memory() -> bool:
    """Whether the Mosaic GPU interpreter knows buffers that share memory, and fences between stores and bulk copies."""
    return jax.__version_info__ >= (0, 12)


def gpu_load(ref: Any, *, layout: Any, optimized: bool = True) -> jax.Array:
    """Loads all of a SMEM or GMEM ref into registers; 0.10 insists on an index, later versions deprecate it."""
    gpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")  # no other backend waits for it
    index = () if jax.__version_info__ >= (0, 11) else ((),)
    return gpu.load(ref, *index, layout=layout, optimized=optimized)


def gpu_store_slowly(ref: Any, value: jax.Array) -> None:
    """Stores registers to all of a SMEM ref even where banks of shared memory conflict.

    Versions without `store` write so whatever the layout; later ones refuse, unless they are told to.
    """
    gpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    if hasattr(gpu, "store"):
        gpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def gpu_operand(x: jax.Array, *, interpret: Any) -> Any:
    """An operand of a Mosaic GPU kernel that only reads it.

    The interpreter of JAX 0.10 must be told that an array lies in global memory. Compiled kernels get the array
    itself: a reference would count as written to, and be copied first.
    """
    gpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    return jax.new_ref(x, memory_space=gpu.GMEM) if interpret else x


def cuda_runtime_version() -> int | None:
    """The CUDA runtime in JAX's plugin, as 1000 * major + 10 * minor; None where there is no such plugin.

    The plugin's own, whatever the machine has: known on a machine without a GPU too.
    """
    versions: Any = importlib.import_module("jax._src.lib").cuda_versions
    return None if versions is None else int(versions.cuda_runtime_get_version())


def num_multiprocessors() -> int | None:
    """Of the GPU that JAX runs on by default: 132 of an H100 SXM, 114 of its PCIe card; None on others; starts JAX."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else None


def device_kind() -> str:
    """The name of the device that JAX runs on by default, such as "NVIDIA H100 80GB HBM3"; starts JAX."""
    return jax.devices()[0].device_kind
