"""Results as a table and as JSON: one file a JAX version, and one page of all of them."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from tests.compile_check.jobs import Result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "compile-check"
PAGE = ROOT / "docs" / "compile-check.md"

_HEADER = (
    "| program | target | layers | compile s | registers | spills | shared KiB | arguments | temp | output | aliased "
    "| GFLOP | GB moved | collectives | |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)

_INTRODUCTION = """# What the compilers say

Written by `make compile-check`, which compiles every kernel and the runner's sharded programs ahead of time with the
compilers of the devices, on a machine that has none of them. That a program compiles says nothing of its values, and
nothing of its speed.

* Bytes are those of one device, as XLA's memory analysis gives them. `aliased` is the part of the output that lies in
  donated arguments: the pools, where they are not copied.
* `registers` a thread, `spills` in bytes and `shared` memory a block are those of the Mosaic GPU kernel that takes
  most of each; ptxas says so. `GFLOP` and `GB moved` are XLA's cost analysis, which it does for TPUs alone and which
  knows of a kernel what its cost estimate says.
* `h100-4` are four devices that share each layer, `h100-2x2` two data shards of two.
* Compile times are those of two shared CPU cores.
"""


def write(results: Sequence[Result], *, full: bool, keep_others: bool) -> None:
    """Write this JAX version's results (beside those of other programs, or alone), and the page of all versions."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"jax-{results[0].jax}{'-all-layers' if full else ''}.json"
    recorded = json.loads((RESULTS / name).read_text())["results"] if keep_others else []
    by_program = {(entry["name"], entry["target"]): entry for entry in recorded}
    by_program |= {(result.name, result.target): dataclasses.asdict(result) for result in results}
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            package: metadata.version(package)
            for package in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu", "flax")
        },
        "results": list(by_program.values()),
    }
    (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text("\n".join(_page_parts()))


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a program."""
    return "\n".join((_HEADER, *map(_row, results)))


def _page_parts() -> list[str]:
    parts = [_INTRODUCTION]
    for path in sorted(RESULTS.glob("jax-*.json")):
        record = json.loads(path.read_text())
        parts += [_heading(record), table([Result(**result) for result in record["results"]]), ""]
    return parts


def _heading(record: Mapping[str, Mapping[str, str]]) -> str:
    versions = dict(record["versions"])
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "jax")
    return f"## JAX {versions['jax']}\n\n{record['date']}; {others}.\n"


def _row(result: Result) -> str:
    cells = (
        result.name,
        result.target,
        result.layers,
        result.compile_s,
        result.registers,
        result.spill_bytes,
        _scaled(result.shared_bytes, 2**10),
        _bytes(result.argument_bytes),
        _bytes(result.temp_bytes),
        _bytes(result.output_bytes),
        _bytes(result.alias_bytes),
        _scaled(result.flops, 1e9),
        _scaled(result.accessed_bytes, 1e9),
        ", ".join(f"{count} {kind}" for kind, count in result.collectives.items()),
        "; ".join(result.failures).replace("|", "/").replace("\n", " "),
    )
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _bytes(size: int | None) -> str:
    """Two digits, with a unit.

    >>> _bytes(33792), _bytes(3 * 2**30), _bytes(None)
    ('33 KiB', '3.0 GiB', '')
    """
    if size is None:
        return ""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            scaled = size / factor
            return f"{scaled:.1f} {unit}" if scaled < 10 else f"{scaled:.0f} {unit}"
    return f"{size} B"


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"
