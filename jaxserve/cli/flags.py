"""Command-line flags made from the config tree: one a setting, so that a new setting is a new flag by itself."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from jaxserve.config import FIELDS, Config, ConfigField, load_config
from jaxserve.errors import ConfigError

ALIASES = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp"}  # vLLM's
LAUNCH_FILE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Launch:
    """What the command line says about the config, before any of it is read."""

    source: str | None = None  # a launch file, or a model
    config_file: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # flat

    @property
    def is_empty(self) -> bool:
        """True where the command line names neither a model nor a launch file."""
        return self.source is None and self.config_file is None and "model" not in self.overrides

    def load(self) -> Config:
        """Read the launch file and put the flags over it; raises `ConfigError`."""
        path, overrides = self.config_file, dict(self.overrides)
        if self.source is not None and self.source.endswith(LAUNCH_FILE_SUFFIXES):
            if path is not None:
                raise ConfigError(f"two launch files given: {self.source!r} and --config {path!r}")
            path = self.source
        elif self.source is not None:
            if overrides.get("model", self.source) != self.source:
                raise ConfigError(f"two models given: {self.source!r} and --model {overrides['model']!r}")
            overrides["model"] = self.source
        return load_config(path, overrides)


class ConfigCommand(TyperCommand):
    """A command whose flags for lists take several values, as vLLM's do: `MODEL --served-model-name a b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what is left when every value has a flag of its own."""
        lists = {option for parameter in self.params if parameter.multiple for option in parameter.opts}
        return super().parse_args(ctx, _one_value_a_flag(args, lists))


def _one_value_a_flag(args: list[str], lists: Collection[str]) -> list[str]:
    """Where the model comes first, as no other argument can follow it.

    >>> _one_value_a_flag(["m", "--names", "a", "b", "--port", "1"], {"--names"})
    ['m', '--names', 'a', '--names', 'b', '--port', '1']
    """
    spread: list[str] = []
    open_list = None  # the flag that words belong to
    for arg in args:
        if arg.startswith("-") or not spread:
            open_list = arg if arg in lists and not args[0].startswith("-") else None
        elif open_list is not None and spread[-1] != open_list:
            spread.append(open_list)
        spread.append(arg)
    return spread


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a `Launch`, the argument and the flags that one is made from."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    clash = {parameter.name for parameter in own} & FIELDS.keys()
    assert not clash, f"{command.__name__}: {clash} are settings already"

    def run(model_or_yaml: str | None, config_file: str | None, **values: Any) -> None:
        flags = {name: values.pop(name) for name in FIELDS}
        given = {name: value for name, value in flags.items() if value is not None and value != []}
        command(Launch(model_or_yaml, config_file, given), **values)

    parameters = [
        *_SOURCE_PARAMETERS,
        *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
        *(_flag(config_field) for config_field in FIELDS.values()),
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_SOURCE_PARAMETERS = [
    _parameter(
        "model_or_yaml",
        Annotated[
            str | None,
            typer.Argument(help="A launch file (.yaml), or a model.", show_default=False, metavar="MODEL_OR_YAML"),
        ],
    ),
    _parameter("config_file", Annotated[str | None, typer.Option("--config", help="A launch file.", metavar="FILE")]),
]


def _flag(config_field: ConfigField) -> inspect.Parameter:
    """The flag of a setting; not given, it is None (or an empty list), and the launch file or the default holds."""
    kind, choices = _kind(config_field)
    spelling = "--" + config_field.name.replace("_", "-")
    if kind is bool:
        spelling += "/--no-" + config_field.name.replace("_", "-")
    aliases = [ALIASES[config_field.name]] if config_field.name in ALIASES else []
    option = typer.Option(
        spelling,
        *aliases,
        help=_help(config_field, is_list=kind == list[str]),
        rich_help_panel=_panel(config_field.section_class),
        show_default=False,
        metavar=f"[{'|'.join(choices)}]" if choices else None,
    )
    return _parameter(config_field.name, Annotated[kind | None, option])


def _kind(config_field: ConfigField) -> tuple[Any, tuple[str, ...]]:
    """A flag's type, and what may be chosen. Bytes, lists of numbers and objects are text that the config parses."""
    annotation = config_field.info.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    is_parsed = bool(config_field.info.metadata) and any(hasattr(m, "func") for m in config_field.info.metadata)
    if typing.get_origin(annotation) is Annotated:
        annotation, is_parsed = typing.get_args(annotation)[0], True
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    if annotation == tuple[str, ...]:
        return list[str], ()
    return (str if is_parsed else annotation), ()


def _help(config_field: ConfigField, *, is_list: bool) -> str:
    text = config_field.info.description or ""
    if is_list:
        text += " Repeat it, or name several after it."
    default = config_field.info.default
    if isinstance(default, bool):
        return text + (" [on]" if default else " [off]")
    if isinstance(default, (str, int, float)) and default != "":
        return f"{text} [{default}]"
    return text


def _panel(section: type[BaseModel]) -> str:
    return (section.__doc__ or section.__name__).strip().rstrip(".")
