"""Results as JSON and as tables: one file of each a JAX version, and one page that sums them up."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.compile_check.jobs import Result
from tests.compile_check.targets import DEVICES, Target

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "compile-check"
PAGE = ROOT / "docs" / "compile-check.md"
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu", "flax")

_INTRODUCTION = """# What the compilers say

Written by `make compile-check`, which compiles every kernel and the runner's sharded programs, the small ones around a
step among them, ahead of time with the compilers of the devices, on a machine that has none of them; with
`ARGS=--drafts` also those of draft models and draft heads, which take as long as two thirds of the rest. That a
program compiles says nothing of its values, and nothing of its speed; what a GPU showed is in
[gpu-check.md](gpu-check.md), and no TPU ran any of this. Llama 3.3 70B is not compiled for v5e: its weights of 141 GB
take more than 8 chips of 16 GB.

A check fails where a GPU kernel spills a register or waits for each product before it starts the next, where a program
makes an array as large as a KV pool or keeps a pool out of its donated argument, where a kernel is given an address
that it was not compiled for, where temporaries exceed a step's activations, where the vocabulary is sorted, and where
devices communicate more often than expected. Programs that break one rule each on purpose must be found first; that of
addresses cannot be broken with JAX 0.10, which copies slices for kernels. Steps have two layers here, those of draft
heads their only one; `ARGS=--full` compiles all of them.
"""

_NOTES = """\
* Bytes are those of one device, as XLA's memory analysis gives them. `aliased` is the part of the output that lies in
  donated arguments: the pools.
* `registers` a thread, `spills` in bytes and `shared` memory a block are those of the Mosaic GPU kernel that takes
  most of each, as ptxas says. Kernels that share their registers out anew among warpgroups show what they start with.
* `h100-4` are four devices that share each layer, `h100-2x2` two data shards of two.
* Compile times are those of two programs at once, each in its own process, on two cores of an AMD EPYC (Zen 4); some
  had other work beside.
"""

_ROOFLINE = """## TPU: the compiler's figures beside the roofline

FLOPs and bytes are XLA's cost analysis of one device's share, which knows of a hand-written kernel what its cost
estimate says; they come from the compiler, not from a device. The times are these figures over what a device can do
at best, and so are lower bounds of what a program takes, not measurements:
{peaks}.
Here are the steps, of as many layers as the table says; kernels and samplers stand in the tables of each JAX version.
"""

# A column's heading, and what stands in it.
_Columns = Sequence[tuple[str, Callable[[Result], Any]]]
_COMMON: _Columns = (
    ("program", lambda result: result.name),
    ("target", lambda result: result.target),
    ("layers", lambda result: result.layers),
)
_KERNEL: _Columns = (
    ("registers", lambda result: result.registers),
    ("spills", lambda result: result.spill_bytes),
    ("shared KiB", lambda result: _scaled(result.shared_bytes, 2**10)),
)
_MEMORY: _Columns = (
    ("arguments", lambda result: _bytes(result.argument_bytes)),
    ("temp", lambda result: _bytes(result.temp_bytes)),
    ("output", lambda result: _bytes(result.output_bytes)),
    ("aliased", lambda result: _bytes(result.alias_bytes)),
)
_END: _Columns = (
    ("collectives", lambda result: ", ".join(f"{count} {kind}" for kind, count in result.collectives.items())),
    ("compile s", lambda result: result.compile_s),
    ("", lambda result: "; ".join(result.failures).replace("|", "/").replace("\n", " ")),
)
_COST: _Columns = (
    ("GFLOP", lambda result: _scaled(result.flops, 1e9)),
    ("GB", lambda result: _scaled(result.accessed_bytes, 1e9)),
    ("ms of products", lambda result: _scaled(_product_s(result), 1e-3)),
    ("ms of memory", lambda result: _scaled(_memory_s(result), 1e-3)),
)


def write(results: Sequence[Result], *, names: Sequence[tuple[str, str]], full: bool) -> None:
    """Put these results beside what is known of this JAX version's other programs, and write all pages anew.

    `names` are the name and target of every program there is: results of others are forgotten.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"jax-{results[0].jax}{'-all-layers' if full else ''}.json"
    known = [Result(**result) for result in json.loads(path.read_text())["results"]] if path.exists() else []
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    by_name = {(result.name, result.target): result for result in known}
    by_name |= {(result.name, result.target): dataclasses.replace(result, date=today) for result in results}
    record = {
        "versions": {package: metadata.version(package) for package in _PACKAGES},
        "results": [dataclasses.asdict(by_name[name]) for name in names if name in by_name],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_pages()


def write_pages() -> None:
    """The summary, and the tables of each record beside it."""
    records = {path: json.loads(path.read_text()) for path in RESULTS.glob("jax-*.json")}
    lines = [_heading_of_summary()]
    newest: tuple[tuple[int, ...], list[Result]] = ((), [])
    for path, record in sorted(records.items(), key=lambda item: _order(item[1])):
        results = [Result(**result) for result in record["results"]]
        path.with_suffix(".md").write_text(_tables(record, results))
        lines.append(_summary_row(path, record, results))
        newest = (_order(record), results)
    steps = [result for result in newest[1] if result.layers and result.flops is not None]
    peaks = "; ".join(
        f"{kind.name} {kind.flops_per_s / 1e12:.0f} TFLOP/s in bfloat16 and {kind.memory_bytes_per_s / 1e9:.0f} GB/s"
        for kind in DEVICES.values()
        if kind.platform == "tpu"
    )
    PAGE.write_text(
        "\n".join(
            [_INTRODUCTION, *lines, "", _NOTES, _ROOFLINE.format(peaks=peaks), _markdown(steps, (*_COMMON, *_COST)), ""]
        )
    )


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a program."""
    return _markdown(results, (*_COMMON, *_KERNEL, *_MEMORY, *_COST, *_END))


def _heading_of_summary() -> str:
    cells = "JAX", "libtpu", "programs", "failed", "most registers", "spills", "compile min, one after another", "dates"
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def _summary_row(path: Path, record: Mapping[str, Any], results: Sequence[Result]) -> str:
    dates = sorted({result.date or "" for result in results})
    cells = (
        f"[{path.stem.removeprefix('jax-')}](results/compile-check/{path.stem}.md)",
        record["versions"]["libtpu"],
        len(results),
        sum(bool(result.failures) for result in results),
        max((result.registers or 0 for result in results), default=0),
        max((result.spill_bytes or 0 for result in results), default=0),
        f"{sum(result.compile_s or 0 for result in results) / 60:.0f}",
        dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _tables(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    versions = dict(record["versions"])
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "jax")
    parts = [f"# JAX {versions['jax']}\n\n{others}. What the columns mean: [the summary](../../compile-check.md).\n"]
    for device in DEVICES:
        of_device = [result for result in results if Target.device_of(result.target) == device]
        figures = _KERNEL if DEVICES[device].platform == "gpu" else _COST
        parts += [f"## {device}\n", _markdown(of_device, (*_COMMON, *figures, *_MEMORY, *_END)), ""]
    return "\n".join(parts)


def _order(record: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in record["versions"]["jax"].split("."))


def _product_s(result: Result) -> float | None:
    return None if result.flops is None else result.flops / DEVICES[Target.device_of(result.target)].flops_per_s


def _memory_s(result: Result) -> float | None:
    if result.accessed_bytes is None:
        return None
    return result.accessed_bytes / DEVICES[Target.device_of(result.target)].memory_bytes_per_s


def _markdown(results: Sequence[Result], columns: _Columns) -> str:
    heading = f"| {' | '.join(name for name, _ in columns)} |\n|{'---|' * len(columns)}"
    rows = ([value(result) for _, value in columns] for result in results)
    return "\n".join(
        (heading, *(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows))
    )


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
    """Three digits.

    >>> _scaled(5.76e9, 1e9), _scaled(1.23e-5, 1e-3), _scaled(None, 1)
    ('5.76', '0.0123', '')
    """
    return "" if value is None else f"{value / unit:.3g}"
