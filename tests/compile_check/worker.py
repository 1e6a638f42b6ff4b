"""Compiles one job in a process of its own: a compiler that crashes takes no other job.

Processes are forked from one that has imported everything and started nothing; importing takes as long as compiling a
small kernel.
"""

from __future__ import annotations

from jaxserve.plan.environment import set_environment

set_environment()

import dataclasses  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from jax.stages import Compiled  # noqa: E402

from jaxserve.plan.hlo import collectives  # noqa: E402
from jaxserve.plan.topologies import lowering_for  # noqa: E402
from tests.compile_check import inspection  # noqa: E402
from tests.compile_check.catalogue import find  # noqa: E402
from tests.compile_check.jobs import Job, Limits, Result  # noqa: E402

_RESULT, _SAID = "result.json", "said"


def run(job: Job, dump_folder: Path) -> Result:
    """Compile `job` and judge it. Raises what the compiler raises."""
    mesh = job.target.mesh()
    begin = time.perf_counter()
    with lowering_for(mesh):
        compiled = job.lower(mesh).compile()
    result = Result.of(job, jax.__version__, compile_s=round(time.perf_counter() - begin, 1))
    _measure(compiled, result)
    _judge(compiled.as_text() or "", job.limits, result)
    if job.target.platform == "cuda" and job.has_kernels:
        _judge_kernels(inspection.kernel_reports(dump_folder), result)
    return result


def _measure(compiled: Compiled, result: Result) -> None:
    memory = compiled.memory_analysis()
    if memory is None:
        result.failures.append("the compiler tells no sizes")
        return
    result.argument_bytes = memory.argument_size_in_bytes
    result.temp_bytes = memory.temp_size_in_bytes
    result.output_bytes = memory.output_size_in_bytes
    result.alias_bytes = memory.alias_size_in_bytes
    cost: Any = compiled.cost_analysis() or {}  # None for GPUs
    result.flops = cost.get("flops")
    result.accessed_bytes = cost.get("bytes accessed")


def _judge(hlo: str, limits: Limits, result: Result) -> None:
    result.collectives = collectives(hlo)
    num_collectives = sum(result.collectives.values())
    if num_collectives > limits.max_collectives:
        result.failures.append(f"{num_collectives} collectives, at most {limits.max_collectives} are expected")
    if limits.pool_elements is not None and (makers := inspection.pool_makers(hlo, limits.pool_elements)):
        result.failures.append(f"makes arrays as large as a pool: {', '.join(sorted(set(makers)))}")
    if unaligned := inspection.unaligned_operands(hlo):
        result.failures.append(
            f"gives kernels slices that do not start at a multiple of {inspection.KERNEL_ALIGNMENT} bytes: "
            f"{', '.join(unaligned)}"
        )
    if (result.alias_bytes or 0) < limits.min_alias_bytes:
        result.failures.append(
            f"results of {result.alias_bytes} bytes lie in donated arguments, {limits.min_alias_bytes} are expected"
        )
    if limits.max_temp_bytes is not None and (result.temp_bytes or 0) >= limits.max_temp_bytes:
        result.failures.append(f"temporaries of {result.temp_bytes} bytes, {limits.max_temp_bytes} are expected")
    if limits.vocab_size is not None:
        for length in inspection.sorts_vocabulary(hlo, limits.vocab_size, limits.num_shards):
            result.failures.append(f"sorts {length} elements, the vocabulary of {limits.vocab_size}")


def _judge_kernels(reports: list[inspection.KernelReport], result: Result) -> None:
    if not reports:
        result.failures.append("no kernel left a report of its registers: none was compiled")
        return
    result.registers = max(report.registers for report in reports)
    result.spill_bytes = max(report.spill_bytes for report in reports)
    result.shared_bytes = max(report.shared_bytes for report in reports)
    for report in reports:
        if report.spill_bytes:
            result.failures.append(f"kernel {report.name} spills registers: {report.spill_bytes} bytes")
        result.failures.extend(f"kernel {report.name}: {warning}" for warning in set(report.warnings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job's process ended: with a result, or with a status other than 0 and what was said on the way."""

    exit_status: int | None  # None: it was killed at the end of its time
    said: str
    result: Result | None


def run_apart(name: str, folder: Path, *, full: bool, timeout_s: float) -> Ended:
    """Run the job of that key in a process of its own, which leaves its files in `folder`."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    process = forks.Process(target=_run_here, args=(name, folder, full))
    process.start()
    process.join(timeout_s)
    is_late = process.is_alive()
    if is_late:
        process.kill()
        process.join()
    result, said = folder / _RESULT, folder / _SAID
    return Ended(
        exit_status=None if is_late else process.exitcode,
        said=said.read_text(errors="replace") if said.exists() else "",
        result=Result(**json.loads(result.read_text())) if result.exists() else None,
    )


def _run_here(name: str, folder: Path, full: bool) -> None:
    with (folder / _SAID).open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    dumps = folder / "kernels"
    dumps.mkdir()
    os.environ |= {
        "MOSAIC_GPU_DUMP_TO": str(dumps),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_MLIR_PASSES": "1",
    }
    result = run(find(name, full=full), dumps)
    (folder / _RESULT).write_text(json.dumps(dataclasses.asdict(result)))
