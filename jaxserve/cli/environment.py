"""`jaxserve collect-env`: prints what a bug report needs to know of the machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def collect_env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, processor, memory and devices, for bug reports."""
    from jaxserve.bench.machine import describe_devices, describe_machine

    facts = describe_machine() | {"devices": describe_devices()}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        print(f"{name + ':':<12} {', '.join(value) if isinstance(value, list) else value}")
