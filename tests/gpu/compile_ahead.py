"""Compiles for an H100, on a machine without one, what `check` will run there: `python -m tests.gpu.compile_ahead`.

Needs what `make compile-check` installs. It tells what compiling costs the 8 minutes, and that no program of the check
is refused by the compiler; steps have two layers.
"""

from __future__ import annotations

from jaxserve.plan.environment import set_environment

set_environment()

import argparse  # noqa: E402
import fnmatch  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.stages import Lowered  # noqa: E402

from jaxserve.parallel.mesh import replicated  # noqa: E402
from jaxserve.plan.topologies import lowering_for  # noqa: E402
from jaxserve.runner.buckets import Bucket  # noqa: E402
from pallas_kernels.isolation import shortened  # noqa: E402
from pallas_kernels.numerics import logical_dtype  # noqa: E402
from pallas_kernels.paged_attention.cases import Case, make_inputs  # noqa: E402
from pallas_kernels.paged_attention.mosaic_gpu import check_supported  # noqa: E402
from pallas_kernels.paged_attention.runs import AttentionRun  # noqa: E402
from tests.compile_check.targets import Target  # noqa: E402
from tests.gpu.attention_programs import decode_run, prefill_run  # noqa: E402
from tests.gpu.cases import attention_cases  # noqa: E402
from tests.gpu.correctness import attention_call  # noqa: E402
from tests.gpu.decode_step import DecodeSteps  # noqa: E402
from tests.gpu.sizes import FULL  # noqa: E402

_STEP_LAYERS = 2


def main() -> int:
    """Exit status 1 if a program does not compile."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.compile_ahead", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="programs whose name holds this")
    parser.add_argument("--threads", type=int, default=1, help="programs at once, as the check compiles them")
    asked = parser.parse_args()
    mesh = Target(device="h100", num_devices=1).mesh()
    wanted = [(name, lower) for name, lower in _programs(mesh).items() if fnmatch.fnmatch(name, f"*{asked.only}*")]
    with ThreadPoolExecutor(asked.threads) as pool:
        compiled = list(pool.map(lambda job: _compiles(*job, mesh), wanted))
    print(f"JAX {jax.__version__}: {sum(compiled)} of {len(compiled)} compile")
    return 0 if all(compiled) else 1


def _compiles(name: str, lower: Callable[[], Lowered], mesh: Mesh) -> bool:
    begin_s = time.perf_counter()
    try:
        with lowering_for(mesh):
            lowered = lower()
            lowered_s = time.perf_counter()
            lowered.compile()
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the finding
        print(f"FAILED {name}: {shortened(f'{type(error).__name__}: {error}')}", flush=True)
        return False
    end_s = time.perf_counter()
    print(f"{name}: lowered in {lowered_s - begin_s:.1f} s, compiled in {end_s - lowered_s:.1f} s", flush=True)
    return True


def _programs(mesh: Mesh) -> dict[str, Callable[[], Lowered]]:
    programs: dict[str, Callable[[], Lowered]] = {}
    for name, case in attention_cases(FULL).items():
        programs[f"correctness/{name}"] = partial(_lower_case, case, mesh)
    for batch in FULL.batches:
        for has_prefill in (False, True):
            run = decode_run(FULL, batch, has_prefill=has_prefill)
            programs[f"decode/{batch}{' as the engine' * has_prefill}"] = partial(_lower_run, run, mesh)
    for prompt in FULL.prompts:
        programs[f"prefill/{prompt}"] = partial(_lower_run, prefill_run(FULL, prompt), mesh)
    sizes = replace(FULL, model=FULL.model | {"num_hidden_layers": _STEP_LAYERS})
    for batch in FULL.batches:
        programs[f"step/{batch}"] = partial(_lower_step, sizes, batch, mesh)
        programs[f"sampler/{batch}"] = partial(_lower_sampler, sizes, batch, mesh)
    return programs


def _lower_case(case: Case, mesh: Mesh) -> Lowered:
    check_supported(case.geometry)
    call, operands = attention_call(case, make_inputs(case, implementation="mosaic_gpu"))
    return call.lower(*_on_device(operands, mesh))


def _lower_run(run: AttentionRun, mesh: Mesh) -> Lowered:
    return run.chain(run.length).lower(*_on_device((run.queries, run.pool, run.pool, run.batches()), mesh))


def _lower_step(sizes: Any, batch: int, mesh: Mesh) -> Lowered:
    return DecodeSteps(sizes, mesh).programs.lower_forward(Bucket(batch, batch))


def _lower_sampler(sizes: Any, batch: int, mesh: Mesh) -> Lowered:
    return DecodeSteps(sizes, mesh).programs.lower_sample(batch, "greedy")


def _on_device(tree: Any, mesh: Mesh) -> Any:
    """Shapes for the mesh; what a CPU stores as the bits of bfloat16 is bfloat16 there."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        is_bits = leaf.dtype == "uint16"
        return jax.ShapeDtypeStruct(
            leaf.shape, logical_dtype(leaf.dtype) if is_bits else leaf.dtype, sharding=replicated(mesh)
        )

    return jax.tree.map(one, tree)


if __name__ == "__main__":
    sys.exit(main())
