"""Compiles one job in a process of its own and prints its `Result` as JSON: a compiler that crashes takes no other."""

from __future__ import annotations

from jaxserve.plan.environment import set_environment

set_environment()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from jax.stages import Compiled  # noqa: E402

from jaxserve.plan.hlo import collectives  # noqa: E402
from jaxserve.plan.topologies import lowering_for  # noqa: E402
from tests.compile_check import inspection  # noqa: E402
from tests.compile_check.catalogue import find  # noqa: E402
from tests.compile_check.jobs import Job, Limits, Result  # noqa: E402


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


def main() -> None:
    """Run the named job; the last line of standard output is its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    job = find(arguments.name, full=arguments.full)
    result = run(job, Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
