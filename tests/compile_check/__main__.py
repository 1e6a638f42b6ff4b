"""Compiles kernels and sharded steps for H100s and TPUs, on a machine with neither; fails where a compiled program
breaks a rule. `--must-fail` compiles programs that break one rule each, and fails if one of them passes."""

from __future__ import annotations

from jaxserve.plan.environment import set_environment

set_environment()

import argparse  # noqa: E402
import fnmatch  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402

from tests.compile_check import report  # noqa: E402
from tests.compile_check.catalogue import all_jobs, key  # noqa: E402
from tests.compile_check.jobs import Job, Result  # noqa: E402
from tests.compile_check.steps import REDUCED_LAYERS  # noqa: E402
from tests.compile_check.worker import run_apart  # noqa: E402

_ABOUT_TRACEBACKS = ("-----", "For simplicity, JAX has removed")
_TIMEOUT_S = 1800  # of one job: all layers of the largest model on slow cores


def main() -> int:
    """Exit status 1 if a program breaks a rule, or, of those that must, does not."""
    arguments = _arguments()
    drafts = arguments.drafts or arguments.only != "*"
    jobs = [job for job in all_jobs(full=arguments.full, drafts=drafts) if _is_asked_for(job, arguments)]
    if not jobs:
        print("no job fits --only and --target", file=sys.stderr)
        return 2
    layers = "all layers" if arguments.full else f"{REDUCED_LAYERS} layers of each model (--full: all)"
    what = "programs that must fail" if arguments.must_fail else f"programs; steps have {layers}"
    print(f"JAX {jax.__version__}: {len(jobs)} {what}", flush=True)
    begin = time.perf_counter()
    names = [(job.name, job.target.name) for job in all_jobs(full=arguments.full) if job.expected is None]
    is_recorded = arguments.record or (arguments.only == "*" and arguments.target is None)
    results: list[Result] = []
    with ThreadPoolExecutor(arguments.processes) as pool:
        for result in pool.map(lambda job: _run(job, full=arguments.full), jobs):
            results.append(result)
            if is_recorded and not arguments.must_fail:  # at once: a run that is cut short keeps what it has
                report.write([result], names=names, full=arguments.full)
    print(f"JAX {jax.__version__}: {time.perf_counter() - begin:.0f} s")
    if arguments.must_fail:
        return _verdict_of_must_fail(jobs, results)
    print(report.table(results))
    return _verdict(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.compile_check", description=__doc__)
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="jobs whose name holds this, * and ? as in files"
    )
    parser.add_argument("--target", choices=("h100", "v5e", "v6e"), help="one kind of device")
    parser.add_argument("--full", action="store_true", help=f"all layers of each model, not {REDUCED_LAYERS}")
    parser.add_argument("--drafts", action="store_true", help="what drafts, too: draft models and heads")
    parser.add_argument("--must-fail", action="store_true", help="compile the programs that must be found at fault")
    parser.add_argument("--record", action="store_true", help="write a part's results to docs/ as well, beside others")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4), help="jobs at once")
    return parser.parse_args()


def _is_asked_for(job: Job, arguments: argparse.Namespace) -> bool:
    return (
        (job.expected is not None) == arguments.must_fail
        and arguments.target in (None, job.target.device)
        and fnmatch.fnmatch(key(job).lower(), f"*{arguments.only.lower()}*")
    )


def _run(job: Job, *, full: bool) -> Result:
    """Compile `job` in a process of its own; what goes wrong there is the result's failure."""
    with tempfile.TemporaryDirectory(prefix="compile-check-") as folder:
        ended = run_apart(key(job), Path(folder), full=full, timeout_s=_TIMEOUT_S)
    if ended.exit_status == 0 and ended.result is not None:
        result = ended.result
    elif ended.exit_status is None:
        result = Result.of(job, jax.__version__, failures=[f"not compiled after {_TIMEOUT_S} s"])
    else:
        said = f"does not compile (exit status {ended.exit_status}): {_error_in(ended.said)}"
        result = Result.of(job, jax.__version__, failures=[said])
    verdict = "; ".join(result.failures) or "ok"
    print(f"  {key(job)}: {result.compile_s or '-'} s, {verdict}", flush=True)
    return result


def _error_in(said: str) -> str:
    """The exception's own lines, or what the compiler said before it ended the process."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(_ABOUT_TRACEBACKS)]
    frames = [index for index, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(lines[frames[-1] + 1 :] if frames and frames[-1] + 1 < len(lines) else lines[-3:])[:600]


def _verdict(results: Sequence[Result]) -> int:
    failed = [result for result in results if result.failures]
    for result in failed:
        print(f"FAILED {result.name} on {result.target}: {'; '.join(result.failures)}")
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _verdict_of_must_fail(jobs: Sequence[Job], results: Sequence[Result]) -> int:
    missed = 0
    for job, result in zip(jobs, results, strict=True):
        if not any((job.expected or "") in failure for failure in result.failures):
            missed += 1
            print(f"NOT FOUND AT FAULT {key(job)}: {result.failures or 'passed'}, wanted {job.expected!r}")
    print(f"{len(jobs) - missed} of {len(jobs)} planted faults were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
