"""What `jaxserve plan` says of the launch files beside the compilers: `python -m tests.compile_check.plans`.

Fails where a plan's weights or KV pool are off by more than a twentieth.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from tests.compile_check.report import ROOT

RECORD = ROOT / "docs" / "results" / "plan-check.json"
PAGE = ROOT / "docs" / "plan-check.md"
LAUNCHES = {  # launch file -> devices
    "configs/llama-3.1-8b-h100.yaml": "h100:1",
    "configs/llama-3.3-70b-h100x4.yaml": "h100:4",
    "configs/llama-3.3-70b-h100x8.yaml": "h100:8",
    "configs/llama-3.1-8b-v5e-4.yaml": "v5e:4",
    "configs/llama-3.1-8b-v6e-4.yaml": "v6e:4",
}
TOLERANCE = 0.05
_TIMEOUT_S = 1800
_INTRODUCTION = f"""# Plans beside the compilers

Written by `make plan-check`: what `jaxserve plan` says of each launch file without a compiler, and what the compiler of
those devices counts when it compiles the whole model's programs (`--compile`), on a machine that has none of them. No
weights are read. GiB are those of one device; `make test` holds today's plans to these records, within
{100 * TOLERANCE:.0f} %.

* weights: the arguments of a decode step and of its sampler, without the pools, the token table and the batch.
* KV pool: the results of a decode step that lie in its arguments, in the pool that is left beside the steps. A plan
  without a compiler leaves more to steps than they take, and so less to the pool.
* steps: what the largest step takes beside weights and pool, estimated and compiled.
* collectives: of a decode step without its sampler.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One launch file's plan and what the compiler counts; bytes of one device."""

    launch_file: str
    devices: str
    layers: int
    weight_bytes: int
    compiled_weight_bytes: int
    pool_bytes: int
    compiled_pool_bytes: int
    step_bytes: int
    compiled_step_bytes: int
    num_collectives: int  # of a decode step's model
    compiled_num_collectives: int
    plan_s: float  # with the compiler
    jax: str
    date: str

    @property
    def worst(self) -> float:
        """How far weights or pool are off, as a share of what the compiler counts."""
        pairs = (self.weight_bytes, self.compiled_weight_bytes), (self.pool_bytes, self.compiled_pool_bytes)
        return max(abs(planned / compiled - 1) for planned, compiled in pairs)


def compare(launch_file: str, devices: str) -> Comparison:
    """Plan and compile; raises where `jaxserve plan` fails."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "plan", launch_file, "--devices", devices, "--compile", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    plan: dict[str, Any] = json.loads(done.stdout)
    memory, compiled = plan["memory"], plan["compiled"]
    return Comparison(
        launch_file=launch_file,
        devices=devices,
        layers=plan["num_layers"],
        weight_bytes=memory["weight_bytes"],
        compiled_weight_bytes=compiled["weight_bytes"],
        pool_bytes=memory["pool_bytes"],
        compiled_pool_bytes=compiled["pool_bytes"],
        step_bytes=memory["step_bytes"],
        compiled_step_bytes=compiled["memory"]["step_bytes"],
        num_collectives=plan["collectives"]["forward"],
        compiled_num_collectives=sum(compiled["collectives"]["forward"].values()),
        plan_s=round(time.perf_counter() - begin, 1),
        jax=metadata.version("jax"),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def recorded() -> list[Comparison]:
    """What was found last."""
    return [Comparison(**entry) for entry in json.loads(RECORD.read_text())]


def page(comparisons: Sequence[Comparison]) -> str:
    """The record as Markdown."""
    columns = "launch file", "devices", "layers", "weights", "KV pool", "steps", "collectives", "JAX", "s", "date"
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in comparisons:
        cells = (
            f"[{one.launch_file}](../{one.launch_file})",
            one.devices,
            one.layers,
            _pair(one.weight_bytes, one.compiled_weight_bytes),
            _pair(one.pool_bytes, one.compiled_pool_bytes),
            _pair(one.step_bytes, one.compiled_step_bytes),
            f"{one.num_collectives} / {one.compiled_num_collectives}",
            one.jax,
            f"{one.plan_s:.0f}",
            one.date,
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join((_INTRODUCTION, "Each cell: the plan's figure / the compiler's.\n", *rows, ""))


def _pair(planned: int, compiled: int) -> str:
    """In GiB, with how far the first is off.

    >>> _pair(3 * 2**30, 4 * 2**30)
    '3.00 / 4.00 (-25.0 %)'
    """
    return f"{planned / 2**30:.2f} / {compiled / 2**30:.2f} ({100 * (planned / compiled - 1):+.1f} %)"


def main() -> int:
    """Compare all, and record what was found; exit status 1 where one is off."""
    comparisons = []
    for launch_file, devices in LAUNCHES.items():
        one = compare(launch_file, devices)
        comparisons.append(one)
        print(f"{launch_file} on {devices}: off by {one.worst:.1%} at most, {one.plan_s:.0f} s", flush=True)
    RECORD.write_text(json.dumps([dataclasses.asdict(one) for one in comparisons], indent=1) + "\n")
    PAGE.write_text(page(comparisons))
    return 1 if any(one.worst > TOLERANCE for one in comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
