"""`jaxserve plan`: whether a config fits some devices, how many requests they serve at once, and how fast at best."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from jaxserve.cli.flags import Launch
from jaxserve.config_values import parse_integers
from jaxserve.errors import ConfigError


def plan(
    launch: Launch,
    devices: Annotated[
        str,
        typer.Option("--devices", help="Kind and number: h100:8, h200:1, a100:1, v5e:4, v6e:8.", show_default=False),
    ],
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-size", help="Requests that decode at once: 1,64. [1, and as many as fit]")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens each of them has. [half of max_model_len]")
    ] = None,
    compile_programs: Annotated[
        bool,
        typer.Option("--compile", help="Confirm with the devices' compiler, where it is installed; takes minutes."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a config needs and can do on devices that need not be here: no weights are read."""
    from jaxserve.plan.environment import set_environment

    set_environment()
    from jaxserve.plan.compiled import confirm
    from jaxserve.plan.devices import Devices
    from jaxserve.plan.memory import plan_or_suggest
    from jaxserve.plan.report import Report
    from jaxserve.plan.roofline import rates

    config, asked = launch.load(), Devices.parse(devices)
    sizes = _batch_sizes(batch_sizes)
    deployment, memory = plan_or_suggest(config, asked)
    confirmation = confirm(config, asked, memory, _tell) if compile_programs else None
    report = Report(
        deployment=deployment,
        memory=memory,
        rates=rates(deployment, memory, batch_sizes=sizes, context=context),
        confirmation=confirmation,
    )
    if as_json:
        print(json.dumps(report.as_data(), indent=2))
    else:
        report.print_table()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _batch_sizes(text: str | None) -> tuple[int, ...]:
    try:
        sizes = parse_integers(text) if text is not None else ()
    except ValueError:
        sizes = (0,)
    if not isinstance(sizes, tuple) or any(size < 1 for size in sizes):
        raise ConfigError(f"--batch-size must be numbers from 1 on, such as 1,64, got {text!r}")
    return sizes
