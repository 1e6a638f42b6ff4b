"""`jaxserve config`: prints the config that a launch file and flags make, or its JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

from jaxserve.cli.flags import Launch
from jaxserve.config import Config


def show_config(
    launch: Launch,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of launch files instead.")] = False,
) -> None:
    """Print the config that a launch file and flags make, as a launch file. API keys are not shown."""
    if schema:
        print(json.dumps(Config.json_schema(), indent=2))
    else:
        print(yaml.safe_dump(launch.load().redacted(), sort_keys=False, allow_unicode=True), end="")
