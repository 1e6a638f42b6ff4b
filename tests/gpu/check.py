"""What only a GPU can show, in one command that ends within 8 minutes: `make gpu-check`, `python -m tests.gpu.check`.

Kernels against their oracle, the engine's tokens, attention and whole steps against what the device can do, throughput
beside a peer. Each stage runs in a process of its own with a share of the time; what fails or hangs is reported and the
rest goes on. Exit status 1: something is wrong or failed. Missed speeds are reported, and are no failure.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.isolation import Outcome, run_isolated
from tests.gpu import report
from tests.gpu.judging import is_sound
from tests.gpu.plan import STAGES, TOTAL_S, Stage
from tests.gpu.sizes import FULL, QUICK, TOY, Sizes

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, write after each what there is, and print the table."""
    asked = _parser().parse_args(arguments)
    sizes = TOY if asked.toy else QUICK if asked.quick else FULL
    stages = [STAGES["device"], *(STAGES[name] for name in asked.stages if name != "device")]
    run = Check(sizes, stages, asked.out, keep=asked.keep)
    run.all_stages()
    print(report.table(run.so_far().table))
    print(f"written to {run.folder}" if run.folder else "nothing written: the device is unknown, and --out not given")
    return 0 if is_sound(run.results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument(
        "--stages", type=_stage_names, default=list(STAGES), metavar="NAMES", help=f"some of: {','.join(STAGES)}"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer cases, batches and layers")
    size.add_argument(
        "--toy", action="store_true", help="tiny sizes on the XLA path of a CPU: tests the command itself"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep stages of earlier runs in the folder that this one does not run"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table [docs/results/<device>]")
    return parser


def _stage_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


class Check:
    """A run: its stages, the time they have, and what they gave so far."""

    def __init__(self, sizes: Sizes, stages: Sequence[Stage], out: Path | None, *, keep: bool = False) -> None:
        self.sizes = sizes
        self.stages = stages
        self.folder = out
        self.keep = keep
        self._kept: dict[str, report.StageRun] = {}
        self._stages: dict[str, report.StageRun] = {}
        self._begin_s = time.monotonic()
        self._date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def all_stages(self) -> None:
        """Without a device there is nothing to check; all other stages stand alone."""
        for index, stage in enumerate(self.stages):
            self._one(stage, limit_s=self._limit_s(index))
            kind = self.so_far().device.get("kind")
            if kind is not None:
                self.folder = self.folder or ROOT / "docs" / "results" / report.folder_name(kind)
            if self.keep and index == 0 and self.folder is not None:
                self._kept = report.earlier_stages(self.folder, self.sizes)
            if self.folder is not None:
                report.write(self.so_far(), self.folder)
            if kind is None:
                return

    @property
    def results(self) -> dict[str, dict[str, Outcome]]:
        """Works of the stages that this run has done."""
        return {name: stage.works for name, stage in self._stages.items()}

    def so_far(self) -> report.Run:
        """What there is to report, in the stages' order."""
        stages = self._kept | self._stages
        return report.Run(
            sizes=self.sizes,
            date=self._date,
            command=" ".join(["python -m tests.gpu.check", *sys.argv[1:]]),
            seconds=time.monotonic() - self._begin_s,
            stages={name: stages[name] for name in sorted(stages, key=_place)},
        )

    def _limit_s(self, index: int) -> float:
        """A stage ends when its share, and those of all before it, have passed; left-out stages leave theirs."""
        later_s = sum(stage.share_s for stage in self.stages[index + 1 :])
        return TOTAL_S - later_s - (time.monotonic() - self._begin_s)

    def _one(self, stage: Stage, *, limit_s: float) -> None:
        begin_s = time.monotonic()
        print(f"{stage.title} ({stage.name}), up to {limit_s:.0f} s", flush=True)
        outcomes = run_isolated(
            [sys.executable, "-m", "tests.gpu.stage", stage.name, self.sizes.name],
            _works(stage, self.sizes),
            silence_s=stage.silence_s,
            limit_s=limit_s,
            environ=_environ(os.environ, self.sizes),
            on_outcome=_show,
        )
        self._stages[stage.name] = report.StageRun(
            date=self._date,
            seconds=time.monotonic() - begin_s,
            works={outcome.name: outcome for outcome in outcomes},
        )


def _place(stage: str) -> int:
    return list(STAGES).index(stage)


def _works(stage: Stage, sizes: Sizes) -> list[str]:
    """Names alone; a module that this process cannot even import has one work, which its own process will fail at."""
    try:
        module: Any = importlib.import_module(stage.module)
    except ImportError:
        return ["import"]
    return module.works(sizes)


def _environ(environ: Mapping[str, str], sizes: Sizes) -> dict[str, str]:
    """A child finds this repository whatever is installed, keeps its programs for the next run, and stays offline."""
    path = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "gpu-check"
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_CLIENT_MEM_FRACTION": "0.9",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": sizes.device,
    }
    return defaults | dict(environ) | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _show(outcome: Outcome) -> None:
    said = f"FAILED {outcome.error}" if outcome.error is not None else outcome.value
    print(f"  {outcome.name} ({outcome.seconds:.1f} s): {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
