"""Measures tile sizes on the device at hand: `python -m pallas_kernels.autotune OP` writes `tuned/<device>/<op>.json`.

For each problem of an op (the sizes of a model's attention, say) every candidate is compiled, held against the oracle
and timed, in a child process: one that does not compile, is wrong or hangs is skipped and named. The kernels read the
file from then on; where no entry fits they take their heuristic tiles.
"""

import argparse
import datetime
import fnmatch
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat import device_kind
from pallas_kernels.isolation import Outcome, run_isolated, serve
from pallas_kernels.tunable import Problem
from pallas_kernels.tuned_tiles import FOLDER, Entry, TunedFile

# Where the problems of an op are, and which devices run it.
OPS: Mapping[str, tuple[str, str]] = {
    "paged_decode": ("pallas_kernels.paged_attention.tuning", "gpu"),
    "paged_prefill": ("pallas_kernels.paged_attention.tuning", "gpu"),
    "ragged_decode": ("pallas_kernels.paged_attention.tuning", "tpu"),
    "ragged_prefill": ("pallas_kernels.paged_attention.tuning", "tpu"),
    "kv_write": ("pallas_kernels.kv_write.tuning", "gpu"),
}

_TOYS = ("kv_write", "ragged_decode", "ragged_prefill")  # the GPU's attention takes its interpreter minutes
_SILENCE_S = 120.0  # that one candidate may take
_LIMIT_S = 4 * 3600.0
_NOISE = 0.02  # a gain that is none


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if there is a problem for which no candidate works; its entry is left out."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.toy and asked.op not in _TOYS:
        parser.error(f"--toy is for {', '.join(_TOYS)}; not for {asked.op}")
    if asked.child:
        serve(lambda names: _measuring(asked.op, toy=asked.toy), is_usable=_is_usable)
        return 0
    known = problems_of(asked.op, toy=asked.toy)
    problems = [problem for problem in known if fnmatch.fnmatch(problem.name, asked.only)]
    if not problems:
        sys.exit(f"--only {asked.only!r} fits none of: {', '.join(problem.name for problem in known)}")
    command = [sys.executable, "-m", "pallas_kernels.autotune", asked.op, "--child", *(["--toy"] if asked.toy else [])]
    names = [_work_name(problem, tiles) for problem in problems for tiles in problem.candidates]
    print(f"{asked.op}: {len(names)} candidates of {len(problems)} problems", flush=True)
    outcomes = run_isolated(command, names, silence_s=_SILENCE_S, limit_s=_LIMIT_S, on_outcome=_show)
    found = tuned_file(asked.op, problems, {outcome.name: outcome for outcome in outcomes})
    if found is None:
        print(f"{asked.op}: no candidate worked, nothing is written")
        return 1
    print(f"written to {found.write(asked.out)}")
    return 0 if len(found.entries) == len(problems) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.autotune", description=__doc__)
    parser.add_argument("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="problems by name, * and ? as in files")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder of the devices' folders [{FOLDER}]")
    parser.add_argument("--toy", action="store_true", help="one small problem in the kernels' interpreter, on a CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def problems_of(op: str, *, toy: bool) -> list[Problem]:
    """What is tuned for an op."""
    module: Any = importlib.import_module(OPS[op][0])
    return module.problems(op, toy=toy)


def tuned_file(op: str, problems: Sequence[Problem], outcomes: Mapping[str, Outcome]) -> TunedFile | None:
    """The best candidate of each problem; None where none of any problem worked."""
    entries = [entry for problem in problems if (entry := best(problem, outcomes)) is not None]
    worked = [outcome.value for outcome in outcomes.values() if outcome.value is not None]
    if not entries:
        return None
    return TunedFile(
        op=op,
        device=worked[0]["device"],
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        jax=worked[0]["jax"],
        entries=tuple(entries),
    )


def best(problem: Problem, outcomes: Mapping[str, Outcome]) -> Entry | None:
    """The candidate with the least geometric mean of its times; the heuristic one unless another gains 2 %."""
    times: list[tuple[float, Mapping[str, int], Mapping[str, float]]] = []
    skipped: dict[str, str] = {}
    heuristic_us: Mapping[str, float] = {}
    for index, tiles in enumerate(problem.candidates):
        outcome = outcomes[_work_name(problem, tiles)]
        if outcome.value is None:
            skipped[json.dumps(tiles)] = outcome.error or "no value"
            continue
        us = outcome.value["us"]
        if index == 0:
            heuristic_us = us
        handicap = 1.0 if index == 0 else 1.0 + _NOISE
        times.append((handicap * math.exp(sum(map(math.log, us.values())) / len(us)), tiles, us))
    if not times:
        return None
    _, tiles, us = min(times, key=lambda entry: entry[0])
    return Entry(sizes=problem.sizes, tiles=tiles, us=us, heuristic_us=heuristic_us, skipped=skipped)


def _measuring(op: str, *, toy: bool) -> Callable[[str], dict[str, Any]]:
    """In the child: measures the candidate that a work names."""
    wanted = "cpu" if toy else OPS[op][1]
    works = {
        _work_name(problem, tiles): (problem, tiles)
        for problem in problems_of(op, toy=toy)
        for tiles in problem.candidates
    }

    def measure(name: str) -> dict[str, Any]:
        if jax.default_backend() != wanted:
            raise RuntimeError(f"{op} is tuned on a {wanted}, JAX runs on {jax.default_backend()} here")
        problem, tiles = works[name]
        return {"us": problem.measure(tiles), "device": device_kind(), "jax": jax.__version__}

    return measure


def _work_name(problem: Problem, tiles: Mapping[str, int]) -> str:
    return f"{problem.name} {json.dumps(tiles)}"


def _is_usable() -> bool:
    try:
        return bool(jnp.ones(8).sum().item() == 8)
    except jax.errors.JaxRuntimeError:
        return False


def _show(outcome: Outcome) -> None:
    said = f"skipped: {outcome.error}" if outcome.error is not None else outcome.value["us"]
    print(f"  {outcome.name}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
