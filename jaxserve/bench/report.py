"""`Report`: a benchmark's result as a table on the terminal and as a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.machine import describe_machine
from jaxserve.errors import ConfigError

_TABLE_COLUMNS = {  # of a summary, in the table's order; the JSON file holds everything
    "requests_per_s": "req/s",
    "output_tokens_per_s": "output\ntok/s",
    "total_tokens_per_s": "all\ntok/s",
}
_LATENCIES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2e_ms": "E2E",
    "step_ms": "step",
    "schedule_ms": "schedule, update",
    "dispatch_ms": "dispatch",
    "result_ms": "result",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured, on what, with which settings. `results` holds one flat mapping a row."""

    benchmark: str
    settings: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]

    def write_json(self, path: str) -> None:
        """Write everything to a file."""
        text = json.dumps(
            {
                "benchmark": self.benchmark,
                "machine": describe_machine(),
                "settings": dict(self.settings),
                "results": [dict(result) for result in self.results],
            },
            indent=2,
        )
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write --json {path!r}: {error.strerror}") from None

    def print_table(self, labels: Sequence[str]) -> None:
        """Print a row a result: its `labels`, then throughput, then p50, p90 and p99 of each latency in ms."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.benchmark, title_justify="left", show_lines=True)
        latencies = {key: title for key, title in _LATENCIES.items() if any(f"{key}_p50" in r for r in self.results)}
        figures = {key: title for key, title in _TABLE_COLUMNS.items() if any(key in r for r in self.results)}
        for title in (*labels, *figures.values(), *(f"{title} ms\np50\np90\np99" for title in latencies.values())):
            table.add_column(title, justify="right")
        for result in self.results:
            cells = [str(result[label]) for label in labels]
            cells += [shown(result[key]) if key in result else "-" for key in figures]
            cells += [_percentiles(result, key) for key in latencies]
            table.add_row(*cells)
        Console().print(table)

    def finish(self, labels: Sequence[str], json_path: str | None) -> None:
        """Print the table, and write the file where one is asked for."""
        self.print_table(labels)
        if json_path is not None:
            self.write_json(json_path)


def check_json_path(path: str) -> None:
    """Raise `ConfigError` unless a report can be written there, before anything is measured."""
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"cannot write --json {path!r}: it is a folder; give a file")
    if not file.parent.is_dir():
        raise ConfigError(f"cannot write --json {path!r}: there is no folder {str(file.parent)!r}; make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"cannot write --json {path!r}: permission denied; give a file that may be written")


def _percentiles(result: Mapping[str, Any], key: str) -> str:
    values = [result.get(f"{key}_p{percent}") for percent in (50, 90, 99)]
    return "\n".join("-" if value is None else shown(value) for value in values)


def shown(value: float) -> str:
    """Three significant digits, and no fewer than the whole part.

    >>> shown(1234.5), shown(12.345), shown(0.01234)
    ('1234', '12.3', '0.0123')
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
