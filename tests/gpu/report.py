"""A run as one JSON file, which holds everything, and one Markdown table, which people read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.isolation import Outcome
from tests.gpu.judging import Line, Results, lines
from tests.gpu.plan import STAGES, TOTAL_S
from tests.gpu.sizes import Sizes

_HEADER = "| check | measured | beside | mark | verdict |\n|---|---|---|---|---|"
_TOY_NOTE = "A toy run on whatever device: it shows that the command works, and no figure in it means anything."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """What a stage gave, and when."""

    date: str
    seconds: float
    works: dict[str, Outcome]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run has so far, with the stages that it keeps of earlier ones."""

    sizes: Sizes
    date: str
    command: str
    seconds: float
    stages: dict[str, StageRun]

    @property
    def results(self) -> Results:
        """Works by stage."""
        return {name: stage.works for name, stage in self.stages.items()}

    @property
    def device(self) -> dict[str, Any]:
        """What the first stage found; empty if it failed."""
        outcome = self.results.get("device", {}).get("device")
        return (outcome.value or {}) if outcome else {}

    @property
    def table(self) -> list[Line]:
        """Without verdicts where the sizes are a toy's."""
        table = lines(self.results, self.sizes)
        if self.sizes.name == "toy":
            table = [dataclasses.replace(line, mark="", verdict="") for line in table]
        return table


def folder_name(device_kind: str) -> str:
    """A device's folder under docs/results.

    >>> folder_name("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def earlier_stages(folder: Path, sizes: Sizes) -> dict[str, StageRun]:
    """Those that a run of the same sizes wrote there; none if there is no such file.

    ValueError for a run of other sizes: its figures say nothing beside these.
    """
    path = folder / "gpu-check.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    if record["sizes"] != json.loads(json.dumps(dataclasses.asdict(sizes))):
        raise ValueError(f"{path} holds a run of other sizes ({record['sizes']['name']}): nothing of it can be kept")
    return {
        name: StageRun(
            date=stage["date"],
            seconds=stage["seconds"],
            works={work: Outcome(**_numbers(outcome)) for work, outcome in stage["works"].items()},
        )
        for name, stage in record["stages"].items()
    }


def write(run: Run, folder: Path) -> None:
    """Write gpu-check.json and gpu-check.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu-check.json").write_text(json.dumps(_finite(_record(run)), indent=1, allow_nan=False) + "\n")
    (folder / "gpu-check.md").write_text(markdown(run))


def markdown(run: Run) -> str:
    """The page: which device, which versions, the table, and what it took."""
    device = run.device
    versions = ", ".join(f"{name} {version}" for name, version in device.get("versions", {}).items())
    told = f"{run.date}; {versions or 'versions unknown'}; CUDA runtime {device.get('cuda_runtime')}."
    counts = Counter(line.verdict for line in run.table if line.verdict)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "none judged"
    times = ", ".join(f"{STAGES[name].title} {stage.seconds:.0f} s" for name, stage in run.stages.items())
    kept = sorted({f"{name} of {stage.date}" for name, stage in run.stages.items() if stage.date < run.date})
    return "\n".join(
        [
            f"# gpu-check on {device.get('kind', 'an unknown device')}",
            "",
            told,
            "",
            _TOY_NOTE if run.sizes.name == "toy" else f"Sizes: {run.sizes.name}. Marks: {summary}.",
            "Kernels are timed in chains of calls inside one dispatch, over keys that no cache holds; `alone` is one",
            "call with its launch and the wait for it. Medians; rates are of the median.",
            "",
            table(run.table),
            "",
            f"Took {run.seconds:.0f} s of {TOTAL_S:.0f}: {times}. Command: `{run.command}`.",
            *([f"Kept from earlier runs: {', '.join(kept)}."] if kept else []),
            "",
        ]
    )


def table(rows: Sequence[Line]) -> str:
    """Markdown, a row a line."""
    return "\n".join([_HEADER, *(_row(line) for line in rows)])


def _row(line: Line) -> str:
    cells = (line.check, line.measured, line.beside, line.mark, line.verdict)
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _record(run: Run) -> dict[str, Any]:
    return {
        "date": run.date,
        "command": run.command,
        "sizes": dataclasses.asdict(run.sizes),
        "device": run.device,
        "seconds": run.seconds,
        "limit_s": TOTAL_S,
        "stages": {
            name: {
                "date": stage.date,
                "seconds": stage.seconds,
                "works": {work: dataclasses.asdict(outcome) for work, outcome in stage.works.items()},
            }
            for name, stage in run.stages.items()
        },
        "table": [dataclasses.asdict(line) for line in run.table],
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no nan: they become words."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """Undoes `_finite`."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
